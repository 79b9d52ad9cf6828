"""Weights on disk: checkpoints and what stages give."""
