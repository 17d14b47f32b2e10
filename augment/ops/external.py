"""Adapters for third-party transforms in a policy: `albumentations.RandomFog: {p: 0.2}`, `imgaug.Snowflakes: {}`.

Each call seeds the transform for its sample, from the same key as every op. The adapters isolate the libraries' random state:

- albumentations and imgaug store random state in the transform, so each thread has separate instances.
- torchvision and some imgaug transforms draw from a global generator. A lock serialises their calls and each call restores the generator.
- Other code of the process can still draw from PyTorch's global generator during a call. Loader workers avoid this.

A library is imported when a policy names one of its transforms.
"""

import inspect
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from refract.augment.ops.base import Args, Op, Size, below, nearest
from refract.augment.ops.pixel import PixelOp
from refract.augment.plan import Step

Run = Callable[[int, np.ndarray], np.ndarray]
_EXTRA = "refract[external]"


@dataclass(frozen=True, kw_only=True)
class ThirdPartyTransform(PixelOp):
    """Apply a transform of albumentations, imgaug or torchvision (v2), seeded for each sample.

    transform: library and class, such as `albumentations.RandomFog`. parameters: the transform's parameters, JSON values. The op's `p`
    replaces the transform's `p`, which becomes 1. `albumentations.RandomFog: {p: 0.2, alpha_coef: 0.1}` in a policy is the short form.
    In the short form, `p` goes to an imgaug transform that has a parameter `p` (such as Dropout's ratio).
    The transform must keep the image's size. Reading a policy runs it on a trial image that is not square.
    """

    transform: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        library, _, name = str(self.transform).partition(".")
        if library not in LIBRARIES or not name:
            raise ValueError(
                f"transform: {self.transform!r} does not start with one of {', '.join(LIBRARIES)} and a dot"
            )
        try:
            self._set("parameters", json.loads(json.dumps(self.parameters)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters: {self.parameters!r} are not JSON values ({error})") from error
        _run_trials(self.transform, json.dumps(self.parameters, sort_keys=True))

    @property
    def name(self) -> str:
        return self.transform

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"transform": self.transform, "parameters": dict(self.parameters), "seed": below(rng, 1 << 31)}

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return [Step("ThirdPartyTransform", self.draw(rng, size))] if rng.random() < self.p else []

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        run = _instance(args["transform"], json.dumps(args["parameters"], sort_keys=True))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the libraries call deprecated functions
                result = np.asarray(run(args["seed"], image.copy()))
        except Exception as error:  # third-party code: the exception types are unknown
            raise ValueError(f"{args['transform']} failed: {type(error).__name__}: {error}") from error
        if result.dtype != np.uint8 or result.shape != image.shape:
            raise ValueError(
                f"{args['transform']} turned uint8 {image.shape} into {result.dtype} {result.shape}; a third-party transform "
                "must keep dtype and shape. Crop and resize with Refract's ops"
            )
        return result

    @staticmethod
    def moves_pixels(args: Args) -> bool:
        kind = _transform_class(args["transform"])
        if args["transform"].startswith("albumentations."):
            return not issubclass(kind, _albumentations()[0].ImageOnlyTransform)
        return kind.__module__.rpartition(".")[2] not in _FIXED_MODULES


@cache
def _run_trials(transform: str, parameters: str) -> None:
    """Run the transform with several seeds: some transforms, such as rotations by 90°, change the size in some draws only.

    Raises ValueError if a run fails or changes the size.
    """
    trial = np.full((48, 64, 3), 120, np.uint8)
    for seed in range(_TRIALS):
        ThirdPartyTransform.on_image(
            {"transform": transform, "parameters": json.loads(parameters), "seed": seed}, trial
        )


_TRIALS = 16

_FIXED_MODULES = (
    "_augment", "_color", "_misc",  # of torchvision
    "arithmetic", "artistic", "blur", "color", "contrast", "convolutional", "edges", "weather",  # of imgaug
)  # fmt: skip
"""Modules whose transforms move no pixels."""


def external_transform(name: str, parameters: Mapping[str, Any]) -> ThirdPartyTransform:
    """Build the op for the short form `name: parameters` of a policy. name: `library.Transform`."""
    options = dict(parameters)
    if name.startswith("imgaug.") and "p" in _signature(_transform_class(name)):
        return ThirdPartyTransform(transform=name, parameters=options)
    p = options.pop("p", 1.0)
    return ThirdPartyTransform(transform=name, parameters=options, p=p)


_thread = threading.local()
_global_generator_lock = threading.Lock()


def _instance(transform: str, parameters: str) -> Run:
    """Return this thread's instance of the transform; each thread builds its instance once."""
    instances = _thread.__dict__.setdefault("instances", {})
    key = (transform, parameters)
    if key not in instances:
        instances[key] = _build(transform, json.loads(parameters))
    return instances[key]


def _build(transform: str, parameters: dict[str, Any]) -> Run:
    transform_class = _transform_class(transform)
    known = _signature(transform_class)
    for name in parameters:
        if known and name not in known:
            raise ValueError(f"{transform} has no parameter {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    library = transform.partition(".")[0]
    if "p" in known and library != "imgaug":
        parameters = {**parameters, "p": 1.0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            instance = transform_class(**parameters)
    except Exception as error:  # third-party code: the exception types are unknown
        raise ValueError(f"{transform} rejected its parameters: {error}") from error
    return LIBRARIES[library][1](instance)


def _transform_class(transform: str) -> type:
    """Return the class of `library.Transform`. ValueError if the library has no such transform or is not installed."""
    library, _, name = transform.partition(".")
    module, base = LIBRARIES[library][0]()
    kind = getattr(module, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, base) or kind is base:
        names = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        raise ValueError(f"{library} has no transform {name!r}{nearest(name, names)}")
    return kind


def _signature(kind: type) -> list[str]:
    """Return the names of the parameters; an empty list if the class accepts any keyword."""
    parameters = inspect.signature(kind).parameters.values()
    return [] if any(item.kind is item.VAR_KEYWORD for item in parameters) else [item.name for item in parameters]


def _missing(library: str, error: ImportError) -> ValueError:
    return ValueError(f"{library} is not installed ({error}); run: pip install '{_EXTRA}'")


def _albumentations() -> tuple[Any, type]:
    # Without this variable, the import queries the package registry for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
    except ImportError as error:
        raise _missing("albumentations", error) from error
    return albumentations, albumentations.BasicTransform


def _run_albumentations(instance: Any) -> Run:
    def run(seed: int, image: np.ndarray) -> np.ndarray:
        instance.set_random_seed(seed)
        return instance(image=image)["image"]

    return run


def _imgaug() -> tuple[Any, type]:
    # imgaug 0.4.0, its last version, uses these names, which NumPy 2 removed.
    for name, value in (
        ("sctypes", {"int": [np.int8, np.int16, np.int32, np.int64], "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
                     "float": [np.float16, np.float32, np.float64]}),
        ("complex", complex),
    ):  # fmt: skip
        if name not in vars(np):
            setattr(np, name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import imgaug.augmenters as iaa
    except ImportError as error:
        raise _missing("imgaug", error) from error
    return iaa, iaa.Augmenter


def _run_imgaug(instance: Any) -> Run:
    from imgaug import random

    def run(seed: int, image: np.ndarray) -> np.ndarray:
        with _global_generator_lock:  # some augmenters draw from imgaug's global generator
            state = random.get_global_rng().state
            try:
                random.seed(seed)
                instance.seed_(seed)
                return instance(image=image)
            finally:
                random.get_global_rng().set_state_(state)

    return run


def _torchvision() -> tuple[Any, type]:
    from torchvision.transforms import v2

    return v2, v2.Transform


def _run_torchvision(instance: Any) -> Run:
    import torch

    def run(seed: int, image: np.ndarray) -> np.ndarray:
        with _global_generator_lock:
            state = torch.get_rng_state()
            try:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU's generator
                result = instance(torch.from_numpy(image).permute(2, 0, 1))
            finally:
                torch.set_rng_state(state)
        return np.ascontiguousarray(result.permute(1, 2, 0).numpy())

    return run


LIBRARIES: Mapping[str, tuple[Callable[[], tuple[Any, type]], Callable[[Any], Run]]] = MappingProxyType(
    {
        "albumentations": (_albumentations, _run_albumentations),
        "imgaug": (_imgaug, _run_imgaug),
        "torchvision": (_torchvision, _run_torchvision),
    }
)

EXTERNAL: Mapping[str, type[Op]] = MappingProxyType({"ThirdPartyTransform": ThirdPartyTransform})
