"""Held-out questions, routing, report."""
