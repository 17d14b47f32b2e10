"""Refract's own networks, a file each. `refract.models.registry.NETWORKS` has them by name.

Each is made as `Network(num_classes, image_size=(height, width), **args)` and maps normalised images (N, 3, H, W) to logits
(N, num_classes). One that must see training images before its first step has a method `prepare(images)`.
"""
