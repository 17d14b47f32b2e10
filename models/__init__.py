"""Networks, the classifier, its losses and training module, and the bundle that stores it."""
