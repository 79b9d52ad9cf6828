"""A page in the browser on which a run is asked."""
