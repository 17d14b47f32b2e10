"""Read, parse and decode request bodies within limits."""
