"""Refract turns a folder of images into a classifier that a team can retrain, review in MLflow and serve.

The public names below are imported on first use, so that `import refract` stays fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refract.augment import Augmenter, load_policy
    from refract.models.bundle.bundle import load_bundle
    from refract.serve.client import Client

__all__ = ["Augmenter", "Client", "load_bundle", "load_policy"]

_MODULES = {
    "Augmenter": "refract.augment",
    "load_policy": "refract.augment",
    "load_bundle": "refract.models.bundle.bundle",
    "Client": "refract.serve.client",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'refract' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
