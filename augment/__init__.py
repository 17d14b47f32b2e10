"""Seeded, serialisable image augmentation: draw a plan, fuse it, execute it.

Knows nothing of training, tracking or serving. PyTorch is imported by the batch executor only (`augment.batch`).
"""

from augment.augmenter import Augmenter
from augment.cpu import planes
from augment.dataset import AugmentedDataset
from augment.decode import ImageError, decode, image_size
from augment.epochs import EpochSampler, SampleKey, ShuffleSampler
from augment.plan import Plan, Step
from augment.policy import Policy, PolicyError, load_policy, presets
from augment.preprocess import Preprocess

__all__ = [
    "AugmentedDataset",
    "Augmenter",
    "EpochSampler",
    "ImageError",
    "Plan",
    "Policy",
    "PolicyError",
    "Preprocess",
    "SampleKey",
    "ShuffleSampler",
    "Step",
    "decode",
    "image_size",
    "load_policy",
    "planes",
    "presets",
]
