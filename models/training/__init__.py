"""How a classifier is trained: losses, optimisers, and the Lightning module."""
