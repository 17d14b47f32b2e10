"""The routes that return predictions."""
