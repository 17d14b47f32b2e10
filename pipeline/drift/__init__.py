"""Drift: whether new data are still of the kind that a classifier was measured on. `profile` tells of data, `compare` of two profiles."""
