"""Serve a bundle over HTTP. Independent of the training code."""
