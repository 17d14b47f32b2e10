"""Describe a bundle as an MLflow model: files that lie next to the bundle's own in MLflow, which neither change nor copy these.

A bundle's reader ignores them, as the bundle's manifest does not list them.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.bundle.info import BundleInfo
from refract.models.modalities import NO_IMAGES
from refract.pipeline.inference.pyfunc import CONFIG, LOADER, outputs_of

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

LARGEST_EXAMPLE = 64 * 1024
"""Bytes of the largest golden sample that becomes the input example as it is; a larger one is replaced by a small JPEG of it."""

EXAMPLE_SIDE = 256
"""The longer side of that JPEG in pixels."""

_patching = threading.Lock()

TRAINING_ONLY = ("python", "lightning")
"""Entries of the bundle's `versions` that a prediction does not need."""


def write_model_files(bundle_folder: Path, folder: Path, run_id: str) -> dict[str, Any]:
    """Write `MLmodel`, the requirements and the input example of a bundle to an empty folder.

    run_id: the ID of the run whose artifact folder `bundle` has the bundle. Returns the model's description for the run's tag
    `mlflow.log-model.history`. BundleError for a damaged bundle, OSError for a folder that cannot be written.
    """
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # else MLflow copies the lock file of the current folder
    import mlflow.pyfunc
    from mlflow.models import Model

    bundle = load_bundle(bundle_folder)
    info = bundle.info
    model = Model(artifact_path="bundle", run_id=run_id)
    with _requirements_unchecked():
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=LOADER,
            mlflow_model=model,
            signature=_signature(bundle),
            input_example=_input_example(bundle),
            pip_requirements=requirements(info.versions, text=info.text is not None),
            model_config={key: list(value) if isinstance(value, tuple) else value for key, value in CONFIG.items()},
            metadata={
                "task": info.task,
                "labels": list(info.labels),
                "bundle": bundle.digest,
                "refract": version("refract"),
            },
        )
    description: dict[str, Any] = model.get_tags_dict()
    return description


@contextmanager
def _requirements_unchecked() -> Iterator[None]:
    """Skip MLflow's warning about requirements that differ from the installed packages.

    To find the packages, MLflow reads the list of the files of each installed one: half a second of a core. A release of MLflow that has
    no such function is left as it is.
    """
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    with _patching:
        original = getattr(environment, name, None)
        if original is not None:
            setattr(environment, name, lambda *_, **__: None)
        try:
            yield
        finally:
            if original is not None:
                setattr(environment, name, original)


def requirements(versions: Mapping[str, str], *, text: bool = False) -> list[str]:
    """Return the packages of a prediction, as lines for pip, with the versions that the bundle was made with.

    versions: package → version, of the bundle. text: whether the network reads texts. A build's local part such as `+cu130` is dropped.
    """
    needed = {name: number for name, number in versions.items() if name not in TRAINING_ONLY}
    more = ("mlflow", "pandas", "safetensors", *(("transformers",) if text else ()))
    for name in more:
        needed.setdefault(name, _installed(name))
    return [f"{name}=={number.partition('+')[0]}" if number else name for name, number in needed.items()]


def _installed(package: str) -> str:
    """Return the version of a package; empty where it is not installed, as `refract sync` may run on another machine."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _signature(bundle: Bundle) -> "ModelSignature":
    """Return the columns of the model's input and output. An input is required if the network reads nothing else."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema, TensorSpec

    info, reads = bundle.info, _reads(bundle.info)
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(kind, name, required=len(reads) == 1)
        for modality, name, kind in (("images", "image", DataType.binary), ("texts", "text", DataType.string))
        if modality in reads
    ]
    familiar = bundle.training_features() is not None
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(Array(kind[:-2]) if kind.endswith("[]") else kind, name)
        for name, kind in outputs_of(
            info.task, familiar, info.abstain_below is not None, hierarchy=info.hierarchy is not None
        ).items()
    ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _input_example(bundle: Bundle) -> Any:
    """Return a table with the golden sample of the fewest bytes; None for a bundle without golden samples."""
    import pandas as pd

    if not bundle.golden_samples:
        return None
    golden = min(bundle.golden_samples, key=lambda sample: len(sample.data))
    reads = _reads(bundle.info)
    columns: dict[str, list[Any]] = {}
    if "images" in reads:
        columns["image"] = [_small(golden.data) if golden.has_image else b""]
    if "texts" in reads:
        columns["text"] = [golden.text]
    return pd.DataFrame(columns)


def _reads(info: BundleInfo) -> list[str]:
    """Return the inputs of the network, as `Classifier.reads`."""
    images = [] if info.network["name"] == NO_IMAGES else ["images"]
    return images if info.text is None else [*images, "texts"]


def _small(data: bytes) -> bytes:
    from refract.pipeline.evaluation.report.figures import small_jpeg

    return data if len(data) <= LARGEST_EXAMPLE else small_jpeg(data, EXAMPLE_SIDE)
