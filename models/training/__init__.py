"""Training of a classifier: losses, optimisers, and the Lightning module."""
