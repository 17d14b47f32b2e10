"""How a model answers: a bundle in, HTTP out. Knows nothing of how the model came to be."""
