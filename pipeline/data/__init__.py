"""Data: sources, checks, splits, and loading to the device."""
