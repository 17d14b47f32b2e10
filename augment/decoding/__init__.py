"""Decode encoded images to uint8 RGB arrays."""
