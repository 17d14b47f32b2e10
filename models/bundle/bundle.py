"""The bundle: one folder that carries a classifier from training to serving, without pickle.

`bundle.json` (what it says of itself, and the golden images' answers), `weights.safetensors`, `golden/NAME` (original
bytes of images), `text/tokenizer.json` (where a transformer reads texts), `reference.safetensors` (how images looked that it did
not learn from, for drift; not in older bundles) and `manifest.json` (SHA-256 and size of each other file). Knows nothing of HTTP,
MLflow or training.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from refract.models.bundle.info import BundleError, BundleInfo, parse_json
from refract.models.bundle.verified_directory import (
    VerifiedDirectory,
    open_verified_directory,
    refuse_existing,
    write_verified_directory,
)
from refract.models.classifier import Classifier
from refract.models.factory import make_classifier

__all__ = ["Bundle", "BundleError", "BundleInfo", "GoldenSample", "load_bundle", "save_bundle"]

INFO = "bundle.json"
WEIGHTS = "weights.safetensors"
TEXT = "text/"
TOKENIZER = ("tokenizer.json",)
REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class GoldenSample:
    """A hold-out image and the answer that evaluation gave: a server is ready when it gives it again.

    name: a plain file name; data: the original encoded bytes; probabilities: one in 0…1 a label; text: that goes with it; has_image: false
    for a text alone. BundleError otherwise.
    """

    name: str
    data: bytes = field(repr=False)
    probabilities: tuple[float, ...]
    text: str = ""
    has_image: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise BundleError(
                f"golden image's name {self.name!r}: expected letters, digits, '.', '_', '-', as in 00.jpg"
            )
        if not self.data:
            raise BundleError(f"golden image {self.name!r} has no bytes")
        if not all(isinstance(p, float | int) and 0 <= p <= 1 for p in self.probabilities):
            raise BundleError(
                f"golden image {self.name!r}: probabilities {self.probabilities}: expected numbers in 0…1"
            )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. digest: SHA-256 of its manifest in hexadecimal, one name for the whole content."""

    path: Path
    info: BundleInfo
    golden_samples: tuple[GoldenSample, ...]
    digest: str
    folder: VerifiedDirectory = field(repr=False)

    def reference(self) -> bytes | None:
        """What `save_bundle` was given as such, for `refract.pipeline.drift`; None where it was given nothing. BundleError if it was
        altered."""
        return self.folder.read(REFERENCE) if REFERENCE in self.folder.files else None

    def classifier(self, device: str | torch.device = "cpu") -> Classifier:
        """The classifier in eval mode, float32, on `device`. Downloads nothing.

        BundleError if the network cannot be built, or the weights are not its own or changed since `load_bundle`.
        """
        weights = _parse_weights(self.path, self.folder.read(WEIGHTS))
        network, preprocess = self.info.network, self.info.preprocess
        own = {name: preprocess[name] for name in ("mean", "std")}
        own["normalize"] = preprocess.get("normalize", "channel")
        files = {name: self.folder.read(TEXT + name) for name in TOKENIZER if TEXT + name in self.folder.files}
        try:
            classifier = make_classifier(network, len(self.info.labels), text=self.info.text, files=files, **own)
        except (ValueError, TypeError, KeyError) as err:
            raise BundleError(f"{self.path / INFO}: the network cannot be built: {err}") from err
        try:
            classifier.load_state_dict(weights, strict=True)
        except RuntimeError as err:
            reason = " ".join(str(err).split())[:400]
            raise BundleError(
                f"{self.path / WEIGHTS} does not fit the network {network['name']!r} that {INFO} names; "
                f"save the bundle with the name, image size and arguments that built the network: {reason}"
            ) from err
        _check_normalisation(self.info, classifier)
        return classifier.to(device).eval()


def save_bundle(
    path: str | Path,
    info: BundleInfo,
    classifier: Classifier,
    golden_samples: Sequence[GoldenSample],
    *,
    reference: bytes | None = None,
) -> Path:
    """Write the bundle whole or not at all, read it back, and only then give it its name `path`. Returns `path`.

    reference: a file of its own, whose meaning is `refract.pipeline.drift`'s. BundleError if `path` exists, if a golden image's answer
    has not
    one number a label, or if `info` does not describe `classifier` (another network, image size, normalisation or number of labels).
    """
    path = Path(path)
    refuse_existing(path)
    _check_golden_samples(info, golden_samples)
    answers = [_answer(golden) for golden in golden_samples]
    record = json.dumps({**info.to_dict(), "goldens": answers}, indent=2, ensure_ascii=False, allow_nan=False)
    contents = {INFO: record.encode(), WEIGHTS: safetensors.torch.save(_plain_weights(classifier))}
    contents |= {f"golden/{golden.name}": golden.data for golden in golden_samples}
    if classifier.tokens is not None:
        contents |= {TEXT + name: data for name, data in classifier.tokens.files.items()}
    if reference is not None:
        contents[REFERENCE] = reference
    # Reading back costs a second and finds now what a server would find at night: arguments that build another network.
    write_verified_directory(path, contents, check=lambda folder: load_bundle(folder).classifier())
    return path


def load_bundle(path: str | Path) -> Bundle:
    """Verify every listed file's size and SHA-256, then parse. Files that the manifest does not list are never read.

    BundleError names the file that is missing, altered, unlisted or outside the folder, and what to do.
    """
    folder = open_verified_directory(Path(path))
    # The weights are checked but not kept: `classifier` reads them when they are wanted, and checks again.
    contents = {name: b"" if name == WEIGHTS else data for name, data in _read_all(folder)}
    try:
        info, answers = _parse_record(contents[INFO])
    except BundleError as err:
        raise BundleError(f"{folder.path / INFO}: {err}") from err
    golden_samples = tuple(
        GoldenSample(data=contents.get(f"golden/{answer['name']}") or folder.read(f"golden/{answer['name']}"), **answer)
        for answer in answers
    )
    _check_golden_samples(info, golden_samples)
    return Bundle(folder.path, info, golden_samples, folder.digest, folder)


def _read_all(folder: VerifiedDirectory) -> list[tuple[str, bytes]]:
    return [(name, folder.read(name)) for name in dict.fromkeys([*folder.files, INFO, WEIGHTS])]


def _answer(golden: GoldenSample) -> dict[str, Any]:
    own = {"name": golden.name, "probabilities": [float(p) for p in golden.probabilities]}
    return own | ({"text": golden.text} if golden.text else {}) | ({} if golden.has_image else {"has_image": False})


def _parse_record(data: bytes) -> tuple[BundleInfo, list[dict[str, Any]]]:
    values = parse_json(data)
    answers = values.pop("goldens", None) if isinstance(values, dict) else None
    info = BundleInfo.from_dict(values)
    form = "a list of {'name': text, 'probabilities': [numbers]}, perhaps with a 'text' and 'has_image'"
    if not isinstance(answers, list) or not all(map(_is_answer, answers)):
        raise BundleError(f"field 'goldens': expected {form}")
    known = ("name", "text", "has_image")
    own = [{name: answer[name] for name in known if name in answer} for answer in map(_renamed, answers)]
    return info, [
        {**one, "probabilities": tuple(answer["probabilities"])} for one, answer in zip(own, answers, strict=True)
    ]


def _renamed(answer: dict[str, Any]) -> dict[str, Any]:
    """A golden sample's record under its present keys: bundles of earlier versions say `pictured`."""
    return {"has_image" if key == "pictured" else key: value for key, value in answer.items()}


def _is_answer(answer: Any) -> bool:
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("name"), str)
        and isinstance(answer.get("probabilities"), list)
        and isinstance(answer.get("text", ""), str)
        and isinstance(_renamed(answer).get("has_image", True), bool)
    )


def _parse_weights(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as err:
        raise BundleError(f"{path / WEIGHTS} is not a safetensors file: {err}; save the bundle again") from err


def _plain_weights(classifier: Classifier) -> dict[str, Tensor]:
    """The state dict on the CPU, float32 or whole numbers, contiguous, each tensor its own memory, with clean keys.

    safetensors refuses tensors that share memory; the copies of tied weights are equal and load back as such.
    """
    weights = {}
    for key, tensor in classifier.state_dict().items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        weights[key.replace("_orig_mod.", "")] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    return weights


def _check_normalisation(info: BundleInfo, classifier: Classifier) -> None:
    if info.preprocess.get("normalize", "channel") != classifier.normalize:
        raise BundleError(
            f"info.preprocess['normalize']={info.preprocess.get('normalize')!r}: expected the classifier's own, {classifier.normalize!r}"
        )
    for name, buffer in (("mean", classifier.mean), ("std", classifier.std)):
        if not torch.equal(buffer.detach().float().cpu(), torch.tensor(info.preprocess[name], dtype=torch.float32)):
            raise BundleError(
                f"info.preprocess[{name!r}]={info.preprocess[name]}: expected the classifier's own, {buffer.tolist()}"
            )


def _check_golden_samples(info: BundleInfo, golden_samples: Sequence[GoldenSample]) -> None:
    names = [golden.name for golden in golden_samples]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise BundleError(f"golden images: the name {twice[0]!r} comes twice")
    for golden in golden_samples:
        if len(golden.probabilities) != len(info.labels):
            raise BundleError(
                f"golden image {golden.name!r} has {len(golden.probabilities)} probabilities: "
                f"expected {len(info.labels)}, one a label"
            )
