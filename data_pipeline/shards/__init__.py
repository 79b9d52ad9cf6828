"""Shards: sample schema, writer, index, integrity."""
