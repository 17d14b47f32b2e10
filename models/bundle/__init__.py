"""The bundle: the folder that carries a classifier from training to serving."""
