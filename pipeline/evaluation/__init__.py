"""Metrics of a trained classifier, and the report that shows them."""
