"""The data sources: folders and tables."""
