"""Encoded images to uint8 RGB arrays."""
