"""Refract's networks, one in each file. `refract.models.registry.NETWORKS` lists them by name.

The constructor is `Network(num_classes, image_size=(height, width), **args)`. A network maps normalised images (N, 3, H, W) to logits
(N, num_classes). A network that needs training images before its first step has a method `prepare(images)`.
"""
