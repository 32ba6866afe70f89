"""Suffix and dense indexes of a corpus on disk; a later piece, nothing uses it yet."""
