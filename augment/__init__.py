"""Seeded, serialisable image augmentation: draw a plan, fuse it, execute it.

Independent of training, tracking and serving. Importing it does not import PyTorch: the batch executor
(`refract.augment.executors.torch_batch`), torchvision's transforms and nlpaug do.
"""

import refract.augment.catalogue  # noqa: F401 — registers the ops
from refract.augment.augmenter import Augmenter
from refract.augment.dataset import AugmentedDataset
from refract.augment.decoding.decode import ImageError, decode, image_size
from refract.augment.executors.cpu import planes
from refract.augment.ops.reader import PolicyError
from refract.augment.plan import Plan, Step
from refract.augment.policy import Policy, load_policy, presets
from refract.augment.preprocess import Preprocess
from refract.augment.samplers import EpochSampler, SampleKey, ShuffleSampler

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
