"""Connections: from a listening socket to the bytes of a request, and back."""
