"""The content of a request: bounded, parsed and decoded."""
