"""Export a bundle's network to the formats of other runtimes, and check that it keeps its predictions."""
