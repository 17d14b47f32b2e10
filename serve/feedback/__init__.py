"""Feedback from production: the recent predictions, their true labels, and the live accuracy that follows."""
