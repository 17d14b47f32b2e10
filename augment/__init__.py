"""Seeded, serialisable image augmentation: draw a plan, fuse it, execute it.

Knows nothing of training, tracking or serving. PyTorch is imported by the batch executor only (`augment.batch`).
"""

from augment.augmenter import Augmenter
from augment.cpu import planes
from augment.decode import ImageError, decode, image_size
from augment.plan import Plan, Step
from augment.policy import Policy, PolicyError, load_policy, presets
from augment.preprocess import Preprocess

__all__ = [
    "Augmenter",
    "ImageError",
    "Plan",
    "Policy",
    "PolicyError",
    "Preprocess",
    "Step",
    "decode",
    "image_size",
    "load_policy",
    "planes",
    "presets",
]
