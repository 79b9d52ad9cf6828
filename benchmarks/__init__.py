"""One script per performance claim; each runs both sides in turn and writes a dated result."""
