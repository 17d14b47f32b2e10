"""Networks and weights that others trained."""
