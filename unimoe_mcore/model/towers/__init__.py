"""Towers: frozen encoders, the cache of their features, and what leads them into the model."""
