"""Transforms of other libraries inside a policy: `albumentations.RandomFog: {p: 0.2}`, `imgaug.Snowflakes: {}`.

Each gets a seed of the sample's own, from the same key as every op. The libraries' traps are kept in here: albumentations and imgaug carry
their random state in the transform, so each thread has transforms of its own; torchvision and some of imgaug's draw from a global
generator, so their calls take turns and put it back. What other code draws from PyTorch's generator meanwhile in the same process is not
kept out: use loader workers, whose processes do nothing else. A library is imported when a policy names one of its transforms, not before.
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


@dataclass(frozen=True, kw_only=True)
class Guest(PixelOp):
    """A transform of albumentations, imgaug or torchvision (v2), seeded for each sample.

    transform: its library and class, such as `albumentations.RandomFog`. parameters: its own, JSON values; its own `p` becomes 1, as this
    op's decides. In a policy `albumentations.RandomFog: {p: 0.2, alpha_coef: 0.1}` is short for it; in that form the `p` of an imgaug
    transform that has one (Dropout's share, say) is that one. It must leave an image's size as it is, and is tried when the policy is
    read, on an image that is not square.
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
            raise ValueError(
                f"parameters: {self.parameters!r} are not plain numbers, texts and lists ({error})"
            ) from error
        _try(self.transform, json.dumps(self.parameters, sort_keys=True))

    @property
    def name(self) -> str:
        return self.transform

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"transform": self.transform, "parameters": dict(self.parameters), "seed": below(rng, 1 << 31)}

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return [Step("Guest", self.draw(rng, size))] if rng.random() < self.p else []

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        run = _instance(args["transform"], json.dumps(args["parameters"], sort_keys=True))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the guests' own deprecated calls
                result = np.asarray(run(args["seed"], image.copy()))
        except Exception as error:  # whatever another library raises for an argument that it cannot work with
            raise ValueError(f"{args['transform']} failed: {type(error).__name__}: {error}") from error
        if result.dtype != np.uint8 or result.shape != image.shape:
            raise ValueError(
                f"{args['transform']} turned uint8 {image.shape} into {result.dtype} {result.shape}; a guest must keep both "
                "(crops and resizing are ops of Refract's own)"
            )
        return result

    @staticmethod
    def moves_pixels(args: Args) -> bool:
        kind = _find(args["transform"])
        if args["transform"].startswith("albumentations."):
            return not issubclass(kind, _albumentations()[0].ImageOnlyTransform)
        return kind.__module__.rpartition(".")[2] not in _STILL


@cache
def _try(transform: str, parameters: str) -> None:
    """ValueError for a transform that fails or changes the size, be it in some draws only, as turns by 90° do."""
    trial = np.full((48, 64, 3), 120, np.uint8)
    for seed in range(_TRIALS):
        Guest.on_image({"transform": transform, "parameters": json.loads(parameters), "seed": seed}, trial)


_TRIALS = 16

_STILL = (
    "_augment", "_color", "_misc",  # of torchvision
    "arithmetic", "artistic", "blur", "color", "contrast", "convolutional", "edges", "weather",  # of imgaug
)  # fmt: skip
"""Modules of other libraries whose transforms leave every pixel in its place."""


def external_transform(name: str, parameters: Mapping[str, Any]) -> Guest:
    """The op that `name: parameters` in a policy is short for. name: `library.Transform`."""
    own = dict(parameters)
    if name.startswith("imgaug.") and "p" in _signature(_find(name)):
        return Guest(transform=name, parameters=own)
    p = own.pop("p", 1.0)
    return Guest(transform=name, parameters=own, p=p)


def is_external(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in LIBRARIES and "." in name


_thread = threading.local()
_turn = threading.Lock()


def _instance(transform: str, parameters: str) -> Run:
    """This thread's transform, made once."""
    made = _thread.__dict__.setdefault("made", {})
    key = (transform, parameters)
    if key not in made:
        made[key] = _make(transform, json.loads(parameters))
    return made[key]


def _make(transform: str, parameters: dict[str, Any]) -> Run:
    kind = _find(transform)
    known = _signature(kind)
    for name in parameters:
        if known and name not in known:
            raise ValueError(f"{transform} has no parameter {name!r}{nearest(name, known)}. Known: {', '.join(known)}")
    library = transform.partition(".")[0]
    if "p" in known and library != "imgaug":
        parameters = {**parameters, "p": 1.0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kind(**parameters)
    except Exception as error:  # as above
        raise ValueError(f"{transform} refused its parameters: {error}") from error
    return LIBRARIES[library][1](made)


def _find(transform: str) -> type:
    library, _, name = transform.partition(".")
    module, base = LIBRARIES[library][0]()
    kind = getattr(module, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, base) or kind is base:
        names = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        raise ValueError(f"{library} has no transform {name!r}{nearest(name, names)}")
    return kind


def _signature(kind: type) -> list[str]:
    """Names of the parameters; none where any is accepted."""
    parameters = inspect.signature(kind).parameters.values()
    return [] if any(item.kind is item.VAR_KEYWORD for item in parameters) else [item.name for item in parameters]


def _missing(library: str, error: ImportError) -> ValueError:
    return ValueError(
        f"{library} is not installed ({error}); install Refract with its guests: pip install 'refract[guests]'"
    )


def _albumentations() -> tuple[Any, type]:
    os.environ.setdefault(
        "NO_ALBUMENTATIONS_UPDATE", "1"
    )  # it asks the package registry for a newer version at import otherwise
    try:
        import albumentations
    except ImportError as error:
        raise _missing("albumentations", error) from error
    return albumentations, albumentations.BasicTransform


def _run_albumentations(made: Any) -> Run:
    def run(seed: int, image: np.ndarray) -> np.ndarray:
        made.set_random_seed(seed)
        return made(image=image)["image"]

    return run


def _imgaug() -> tuple[Any, type]:
    # Version 0.4.0 is the last and older than NumPy 2, which dropped these names.
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


def _run_imgaug(made: Any) -> Run:
    from imgaug import random

    def run(seed: int, image: np.ndarray) -> np.ndarray:
        with _turn:  # some augmenters draw from imgaug's global generator
            state = random.get_global_rng().state
            try:
                random.seed(seed)
                made.seed_(seed)
                return made(image=image)
            finally:
                random.get_global_rng().set_state_(state)

    return run


def _torchvision() -> tuple[Any, type]:
    from torchvision.transforms import v2

    return v2, v2.Transform


def _run_torchvision(made: Any) -> Run:
    import torch

    def run(seed: int, image: np.ndarray) -> np.ndarray:
        with _turn:
            state = torch.get_rng_state()
            try:
                torch.default_generator.manual_seed(
                    seed
                )  # the CPU's alone: torch.manual_seed would reach into the GPU's
                result = made(torch.from_numpy(image).permute(2, 0, 1))
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

EXTERNAL: Mapping[str, type[Op]] = MappingProxyType({"Guest": Guest})
