"""Importers: one file per family of sources; each yields the items of its tasks."""
