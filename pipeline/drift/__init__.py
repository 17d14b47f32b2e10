"""Drift: whether new data differ from those that a classifier was evaluated on. `profile` describes data, `compare` two profiles."""
