"""Augmentation of a sample's text."""
