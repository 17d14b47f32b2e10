"""Readers of the data sources: folders and tables."""
