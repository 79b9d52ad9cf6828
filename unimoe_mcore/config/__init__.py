"""Typed recipes."""
