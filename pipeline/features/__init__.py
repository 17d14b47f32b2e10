"""Embeddings of samples: the store that all commands share, their computation, heads that are fitted on them, and search."""
