"""Third-party networks and pretrained weights."""
