"""The bundle as an MLflow model: MLflow imports this module by its name, which an `MLmodel` file next to the bundle's files has.

MLflow calls `_load_pyfunc` in `mlflow.pyfunc.load_model`, in `mlflow models serve` and in each worker of a Spark UDF. Nothing is unpickled.
"""

import base64
import binascii
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.prediction import confidences, prediction
from refract.pipeline.inference.scoring import SampleInput, Scored, preprocess_of, problem_of, score_outputs

if TYPE_CHECKING:
    import pandas as pd

LOADER = "refract.pipeline.inference.pyfunc"
"""The name of this module in `MLmodel`. Registered versions have it, so the module must keep its place."""

CONFIG = {"device": "auto", "batch_size": 64, "plugins": ()}
"""The keys of MLflow's `model_config` with their defaults. device: auto takes a GPU if there is one, else the CPU; plugins: files and
modules that the network needs."""


class BundleModel:
    """Predicts with a bundle in float32, as `refract score` and `refract evaluate`."""

    def __init__(self, bundle: Bundle, *, device: str = "auto", batch_size: int = 64) -> None:
        """BundleError if the network cannot be built or the weights do not fit it."""
        import torch

        from refract.models.familiarity import Familiarity

        self.info, self._batch_size = bundle.info, batch_size
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._classifier, self._preprocess = bundle.classifier(device), preprocess_of(bundle.info)
        training = bundle.training_features()
        self._familiarity = None if training is None else Familiarity(training, torch.device("cpu"))
        self._lock = threading.Lock()  # two forward passes at once would mix the embeddings

    def predict(self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Predict a table of N rows. Returns N rows, in their order, with the columns of `outputs_of`.

        model_input: the column `image`, encoded bytes or their base64 text, and for models that read texts `text`; empty and missing values
        are samples without an image or a text. A row without a prediction has its reason in `error`. ValueError for other columns.
        """
        import pandas as pd

        images, texts = _columns(model_input, self._classifier.reads)
        samples = [
            SampleInput(_reader(image), text, image is not None) for image, text in zip(images, texts, strict=True)
        ]
        with self._lock:
            outcomes = list(
                score_outputs(
                    self._classifier,
                    self._preprocess,
                    samples,
                    embed=False,
                    familiarity=self._familiarity,
                    task=self.info.task,
                    temperature=self.info.temperature,
                    batch_size=self._batch_size,
                )
            )
        rows = [self._row(sample, outcome) for sample, outcome in zip(samples, outcomes, strict=True)]
        info = self.info
        columns = outputs_of(
            info.task,
            self._familiarity is not None,
            info.abstain_below is not None,
            hierarchy=info.hierarchy is not None,
        )
        # Objects, if numbers are missing: NaN is not JSON.
        kinds = {name: object if any(row[name] is None for row in rows) else None for name in columns}
        series = {name: pd.Series([row[name] for row in rows], model_input.index, kinds[name]) for name in columns}
        return pd.DataFrame(series, index=model_input.index)

    def _row(self, sample: SampleInput, outcome: Scored | Exception) -> dict[str, Any]:
        problem = problem_of(outcome, self._classifier.reads, sample.has_image, sample.text)
        if problem is not None or not isinstance(outcome, Scored):
            return _NO_PREDICTION | {"error": problem}
        info, row = self.info, outcome.probabilities
        multilabel = info.task == "multilabel"
        predicted = prediction(
            row, info.labels, top=1, thresholds=info.thresholds if multilabel else None, abstain_below=info.abstain_below,
            confidence=float(confidences(row[None], info.task, info.thresholds)[0]), backed_off=info.back_offs(row[None])[0],
        )  # fmt: skip
        del predicted["top"]
        parent = predicted.pop("backed_off", None)
        predicted["backed_off"] = "" if parent is None else parent["label"]
        predicted["backed_off_confidence"] = None if parent is None else parent["confidence"]
        familiarity = outcome.familiarity
        if familiarity is not None and math.isnan(familiarity):
            familiarity = None
        return predicted | {"probabilities": row.tolist(), "familiarity": familiarity, "error": ""}


_NO_PREDICTION: dict[str, Any] = {
    "label": "", "labels": [], "confidence": None, "probabilities": None, "familiarity": None, "abstain": True,
    "backed_off": "", "backed_off_confidence": None,
}  # fmt: skip
"""A row without a prediction. Spark has no null for texts and Booleans here, so these have a value."""


def outputs_of(task: str, familiarity: bool, abstains: bool, *, hierarchy: bool = False) -> dict[str, str]:
    """Return the columns of the output, name → type in MLflow's words; `…[]` is an array. familiarity, abstains, hierarchy: whether the
    bundle has training features, a confidence below which it abstains, and a class hierarchy."""
    columns = {"label": "string"}
    columns |= {"labels": "string[]"} if task == "multilabel" else {}
    columns |= {"confidence": "double", "probabilities": "double[]"}
    columns |= {"familiarity": "double"} if familiarity else {}
    columns |= {"backed_off": "string", "backed_off_confidence": "double"} if hierarchy else {}
    columns |= {"abstain": "boolean"} if abstains else {}
    return columns | {"error": "string"}


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> BundleModel:
    """Load the bundle in the folder `path`. MLflow calls this function. model_config: see `CONFIG`.

    ValueError for a setting that is not accepted, BundleError for a damaged bundle, PluginError for a plugin that cannot be loaded.
    """
    from refract.plugins import load

    settings = _settings(model_config or {})
    load(settings["plugins"])
    return BundleModel(load_bundle(Path(path)), device=settings["device"], batch_size=settings["batch_size"])


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `CONFIG` with the given values. ValueError names the key, its value and what is accepted."""
    settings = {**CONFIG, **given}
    device, size, plugins = settings["device"], settings["batch_size"], settings["plugins"]
    settings["plugins"] = plugins = [plugins] if isinstance(plugins, str) else plugins
    named = isinstance(plugins, list | tuple) and all(isinstance(name, str) for name in plugins)
    for key, accepted, expected in (
        ("device", isinstance(device, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", device), "auto, cpu or cuda"),
        ("batch_size", type(size) is int and size > 0, "a whole number of at least 1"),
        ("plugins", named, "a list of files and modules"),
    ):
        if not accepted:
            raise ValueError(f"model_config: {key}: received {given[key]!r}; expected {expected}")
    return settings


def _columns(table: "pd.DataFrame", reads: Iterable[str]) -> tuple[list[Any], list[str]]:
    """Return (the images, None for none; the texts, "" for none). ValueError for a table without a column that the model reads."""
    names = [name for name, kind in (("image", "images"), ("text", "texts")) if kind in reads]
    columns = getattr(table, "columns", None)
    if columns is None or not any(name in columns for name in names):
        given = type(table).__name__ if columns is None else f"the columns {', '.join(map(str, columns)) or 'none'}"
        raise ValueError(f"expected a table with the column {' or '.join(names)}, received {given}")

    def column(name: str) -> Sequence[Any]:
        return table[name].tolist() if name in columns and name in names else [None] * len(table)

    images = [_encoded(image) for image in column("image")]
    return images, [text if isinstance(text, str) else "" for text in column("text")]


def _encoded(value: Any) -> Any:
    """Return a value of the column `image`; None for an empty or a missing one."""
    import pandas as pd

    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    empty = not value if isinstance(value, bytes | str) else pd.api.types.is_scalar(value) and pd.isna(value)
    return None if empty else value


def _reader(image: Any) -> Callable[[], bytes]:
    """Return the function that reads the encoded image. It raises OSError for a text that is not base64, and for another type."""

    def read() -> bytes:
        if image is None or isinstance(image, bytes):
            return image or b""
        if not isinstance(image, str):
            raise OSError(
                f"the image is a {type(image).__name__}; expected the bytes of an image file, or their base64 text"
            )
        try:
            return base64.b64decode("".join(image.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise OSError(f"the image is a text that is not base64 ({error})") from error

    return read
