"""Tokenizer and template."""
