"""The bundle: one folder that carries a classifier from training to serving, without pickle.

Files:
- `bundle.json`: the metadata (`BundleInfo`) and the golden samples' expected probabilities
- `weights.safetensors`: the classifier's state dict
- `golden/NAME`: the original bytes of each golden sample's image
- `text/tokenizer.json`: the tokenizer, if a transformer reads texts
- `reference.safetensors`: statistics of images outside the training set, for drift detection; absent in older bundles
- `training.safetensors`: features and thumbnails of training images, for familiarity and similar images; absent in older bundles
- `manifest.json`: SHA-256 and size of each other file

Independent of HTTP, MLflow and training.
"""

import json
import logging
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
from refract.models.multimodal.former_names import rename
from refract.models.training_features import TrainingFeatures
from refract.plugins import loaded
from refract.remote.address import is_remote

__all__ = ["Bundle", "BundleError", "BundleInfo", "GoldenSample", "load_bundle", "save_bundle"]

log = logging.getLogger(__name__)

INFO = "bundle.json"
WEIGHTS = "weights.safetensors"
TEXT = "text/"
TOKENIZER = ("tokenizer.json",)
REFERENCE = "reference.safetensors"
TRAINING = "training.safetensors"


@dataclass(frozen=True)
class GoldenSample:
    """A test image with the prediction that evaluation computed. A server is ready when it reproduces the prediction.

    name: a plain file name; data: the original encoded bytes; probabilities: one number in 0…1 for each label; text: the sample's text,
    "" without one; has_image: False for a sample that is only a text. BundleError for another value.
    """

    name: str
    data: bytes = field(repr=False)
    probabilities: tuple[float, ...]
    text: str = ""
    has_image: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise BundleError(
                f"name {self.name!r} of a golden sample: expected letters, digits, '.', '_', '-', as in 00.jpg"
            )
        if not self.data:
            raise BundleError(f"golden sample {self.name!r} has an empty file: expected an encoded image")
        if not all(isinstance(p, float | int) and 0 <= p <= 1 for p in self.probabilities):
            raise BundleError(
                f"golden sample {self.name!r}: probabilities {self.probabilities}: expected numbers in 0…1"
            )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. digest: SHA-256 of its manifest in hexadecimal, which identifies the whole content."""

    path: Path
    info: BundleInfo
    golden_samples: tuple[GoldenSample, ...]
    digest: str
    folder: VerifiedDirectory = field(repr=False)

    def reference(self) -> bytes | None:
        """Read the reference that `save_bundle` stored for `refract.pipeline.drift`. None if the bundle has no reference. BundleError if
        the file was altered."""
        return self.folder.read(REFERENCE) if REFERENCE in self.folder.files else None

    def weights(self) -> dict[str, Tensor]:
        """Read the state dict of the classifier, on the CPU. BundleError if the file changed since `load_bundle`."""
        weights = _parse_weights(self.path, self.folder.read(WEIGHTS))
        if self.info.text is not None:
            rename(weights, "network.")
        return weights

    def training_features(self) -> TrainingFeatures | None:
        """Read the training features. None if the bundle has none. BundleError if the file was altered or is damaged."""
        if TRAINING not in self.folder.files:
            return None
        return TrainingFeatures.from_bytes(self.folder.read(TRAINING), len(self.info.labels))

    def classifier(self, device: str | torch.device = "cpu") -> Classifier:
        """Build the classifier in eval mode, float32, on `device`. Downloads nothing, and loads no plugin.

        BundleError if the network cannot be built or needs a plugin that is not loaded, if the weights do not fit it, or if they changed
        since `load_bundle`.
        """
        self._check_plugins()
        weights = self.weights()
        network, preprocess = self.info.network, self.info.preprocess
        normalisation = {name: preprocess[name] for name in ("mean", "std")}
        normalisation["normalize"] = preprocess.get("normalize", "channel")
        files = {name: self.folder.read(TEXT + name) for name in TOKENIZER if TEXT + name in self.folder.files}
        try:
            classifier = make_classifier(
                network, len(self.info.labels), text=self.info.text, files=files, **normalisation
            )
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

    def _check_plugins(self) -> None:
        """Raise BundleError for a plugin that the network needs and that is not loaded. Log a warning if its code differs."""
        digests = {plugin.name: plugin.sha256 for plugin in loaded()}
        for plugin in self.info.plugins:
            name = plugin["name"]
            if name not in digests:
                hint = f"FILE with the {name} of the run's folder plugins/" if name.endswith(".py") else name
                raise BundleError(
                    f"{self.path / INFO}: the network {self.info.network['name']!r} needs the plugin {name}, which is not loaded; "
                    f"add --plugin {hint}"
                )
            if digests[name] != plugin["sha256"]:
                log.warning(
                    "the plugin %s differs from the one that trained %s: its SHA-256 is %s, not %s",
                    name, self.path, digests[name][:12], plugin["sha256"][:12],
                )  # fmt: skip


def save_bundle(
    path: str | Path,
    info: BundleInfo,
    classifier: Classifier,
    golden_samples: Sequence[GoldenSample],
    *,
    reference: bytes | None = None,
    training: TrainingFeatures | None = None,
) -> Path:
    """Write the bundle atomically: into a temporary folder, then verify it by loading it, then rename it to `path`. Returns `path`.

    reference: the content of `reference.safetensors`, whose format belongs to `refract.pipeline.drift`. training: the training features.
    BundleError if `path` exists, if a golden sample does not have one probability for each label, or if `info` does not describe
    `classifier` (another network, image size, normalisation or number of labels).
    """
    path = Path(path)
    refuse_existing(path)
    _check_golden_samples(info, golden_samples)
    goldens = [_golden_record(golden) for golden in golden_samples]
    record = json.dumps({**info.to_dict(), "goldens": goldens}, indent=2, ensure_ascii=False, allow_nan=False)
    contents = {INFO: record.encode(), WEIGHTS: safetensors.torch.save(_plain_weights(classifier))}
    contents |= {f"golden/{golden.name}": golden.data for golden in golden_samples}
    if classifier.tokens is not None:
        contents |= {TEXT + name: data for name, data in classifier.tokens.files.items()}
    if reference is not None:
        contents[REFERENCE] = reference
    if training is not None:
        contents[TRAINING] = training.to_bytes()
    # Loading the bundle costs a second. It catches arguments that build another network before a server loads the bundle.
    write_verified_directory(path, contents, check=lambda folder: load_bundle(folder).classifier())
    return path


def load_bundle(path: str | Path) -> Bundle:
    """Verify the size and SHA-256 of every file in the manifest, then parse. Files outside the manifest are never read.

    path: a folder, or the URL of one, which is downloaded once for each version. BundleError names the file that is missing, altered,
    unlisted or outside the folder, and what to do. AddressError and RemoteError for a URL.
    """
    if is_remote(str(path)):
        return _load_remote(str(path))
    folder = open_verified_directory(Path(path))
    # The weights are verified but not held in memory: `Bundle.classifier` reads and verifies them again.
    contents = {name: b"" if name == WEIGHTS else data for name, data in _read_all(folder)}
    try:
        info, records = _parse_info(contents[INFO])
    except BundleError as err:
        raise BundleError(f"{folder.path / INFO}: {err}") from err
    golden_samples = tuple(
        GoldenSample(data=contents.get(f"golden/{record['name']}") or folder.read(f"golden/{record['name']}"), **record)
        for record in records
    )
    _check_golden_samples(info, golden_samples)
    return Bundle(folder.path, info, golden_samples, folder.digest, folder)


def _load_remote(url: str) -> Bundle:
    from refract.remote.folders import fetched_folder

    try:
        return load_bundle(fetched_folder(url))
    except BundleError:
        local = fetched_folder(url, again=True)  # the local copy may be damaged
        try:
            return load_bundle(local)
        except BundleError as err:
            raise BundleError(str(err).replace(str(local), url)) from err


def _read_all(folder: VerifiedDirectory) -> list[tuple[str, bytes]]:
    return [(name, folder.read(name)) for name in dict.fromkeys([*folder.files, INFO, WEIGHTS])]


def _golden_record(golden: GoldenSample) -> dict[str, Any]:
    record = {"name": golden.name, "probabilities": [float(p) for p in golden.probabilities]}
    return record | ({"text": golden.text} if golden.text else {}) | ({} if golden.has_image else {"has_image": False})


def _parse_info(data: bytes) -> tuple[BundleInfo, list[dict[str, Any]]]:
    """Parse `bundle.json` into (the metadata, the arguments of each GoldenSample except `data`)."""
    values = parse_json(data)
    records = values.pop("goldens", None) if isinstance(values, dict) else None
    info = BundleInfo.from_dict(values)
    form = "a list of {'name': text, 'probabilities': [numbers]}, each optionally with 'text' and 'has_image'"
    if not isinstance(records, list) or not all(map(_is_golden_record, records)):
        raise BundleError(f"field 'goldens': expected {form}")
    keys = ("name", "text", "has_image")
    return info, [
        {key: record[key] for key in keys if key in record} | {"probabilities": tuple(record["probabilities"])}
        for record in map(_with_current_keys, records)
    ]


def _with_current_keys(record: dict[str, Any]) -> dict[str, Any]:
    """Rename the key that earlier versions wrote instead of `has_image`."""
    return {"has_image" if key == "pictured" else key: value for key, value in record.items()}


def _is_golden_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("name"), str)
        and isinstance(record.get("probabilities"), list)
        and isinstance(record.get("text", ""), str)
        and isinstance(_with_current_keys(record).get("has_image", True), bool)
    )


def _parse_weights(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as err:
        raise BundleError(f"{path / WEIGHTS} is not a safetensors file: {err}; save the bundle again") from err


def _plain_weights(classifier: Classifier) -> dict[str, Tensor]:
    """Copy the state dict to contiguous CPU tensors, floats as float32, without torch.compile's key prefix.

    Each tensor gets separate memory, as safetensors rejects tensors that share memory. The copies of tied weights are equal, and
    loading them restores the tie.
    """
    weights = {}
    for key, tensor in classifier.state_dict().items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        weights[key.replace("_orig_mod.", "")] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    return weights


def _check_normalisation(info: BundleInfo, classifier: Classifier) -> None:
    if info.preprocess.get("normalize", "channel") != classifier.normalize:
        raise BundleError(
            f"info.preprocess['normalize']={info.preprocess.get('normalize')!r}: expected the classifier's value, {classifier.normalize!r}"
        )
    for name, buffer in (("mean", classifier.mean), ("std", classifier.std)):
        if not torch.equal(buffer.detach().float().cpu(), torch.tensor(info.preprocess[name], dtype=torch.float32)):
            raise BundleError(
                f"info.preprocess[{name!r}]={info.preprocess[name]}: expected the classifier's value, {buffer.tolist()}"
            )


def _check_golden_samples(info: BundleInfo, golden_samples: Sequence[GoldenSample]) -> None:
    names = [golden.name for golden in golden_samples]
    if duplicates := [name for i, name in enumerate(names) if name in names[:i]]:
        raise BundleError(f"golden samples: the name {duplicates[0]!r} occurs twice; give each sample its own name")
    for golden in golden_samples:
        if len(golden.probabilities) != len(info.labels):
            raise BundleError(
                f"golden sample {golden.name!r} has {len(golden.probabilities)} probabilities: "
                f"expected {len(info.labels)}, one for each label"
            )
