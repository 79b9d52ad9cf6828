"""Readers of strangers' files, given files that were spoilt at random."""
