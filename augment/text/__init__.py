"""Augmentation of texts, such as captions."""
