"""The names by which configs and bundles say which modalities a network reads. Imports no PyTorch."""

NO_IMAGES = "none"
"""The name of the image network in a classifier that reads only texts."""

NO_TEXTS = "none"
"""The name of the text network in a config whose classifier reads only images."""

HASHING = "hashing"
"""The text network of hashed n-grams, which has no pretrained weights."""
