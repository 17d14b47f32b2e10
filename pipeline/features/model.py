"""A model that embeds samples: its classifier, its preprocessing, and the key under which the store keeps its embeddings."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refract.augment import Preprocess
from refract.models.bundle.bundle import Bundle, load_bundle
from refract.models.classifier import Classifier
from refract.models.credentials import masked
from refract.models.head import called_head
from refract.models.pretrained.weights import folder_arrays
from refract.models.registry import build, weights_preprocess
from refract.pipeline.config.model_weights import is_in_mlflow
from refract.pipeline.config.sections import DataConfig, ModelConfig
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.preprocessing import make_preprocess
from refract.pipeline.inference.scoring import preprocess_of
from refract.plugins import provider

INFO = "bundle.json"

Size = int | Sequence[int]
"""Side of a square, or (height, width), in pixels."""

DEFAULT_SIZE = (224, 224)
"""Height and width of the input of a network whose weights record none."""


@dataclass(frozen=True)
class EmbeddingModel:
    """classifier: in eval mode; its head plays no part. key: see `model_key`. record: values from which `reopen` builds the model again."""

    classifier: Classifier
    preprocess: Preprocess
    key: str
    record: Mapping[str, Any] = field(default_factory=dict)


def embedding_model(
    classifier: Classifier,
    preprocess: Preprocess,
    network: Mapping[str, Any],
    text: Mapping[str, Any] | None,
    record: Mapping[str, Any],
) -> EmbeddingModel:
    """network, text: the bundle's records of the networks."""
    return EmbeddingModel(classifier, preprocess, model_key(classifier, preprocess, network, text), record)


def model_key(
    classifier: Classifier, preprocess: Preprocess, network: Mapping[str, Any], text: Mapping[str, Any] | None
) -> str:
    """Return the SHA-256 of all that an embedding depends on besides the sample: the weights below the head, the networks' names and
    arguments, the tokenizer's files, the preprocessing, and the code of the plugin that adds the network.
    """
    args = {name: value for name, value in network["args"].items() if name != "head"}
    facts: dict[str, Any] = {"network": {**network, "args": args}, "text": text, "preprocess": preprocess.to_dict()}
    if (plugin := provider("network", str(network["name"]))) is not None:
        facts["plugin"] = plugin.sha256
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    head = {id(value) for value in called_head(classifier.network).state_dict(keep_vars=True).values()}
    for name, value in sorted(classifier.state_dict(keep_vars=True).items()):
        if id(value) not in head:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    for name, data in sorted(classifier.tokens.files.items()) if classifier.tokens is not None else ():
        digest.update(name.encode() + data)
    return digest.hexdigest()


def open_model(model: str, weights: str = "none", image_size: Size | None = None) -> EmbeddingModel:
    """Open the model that a user names.

    model: the folder of a bundle or of a run, or the name of a network; weights, image_size: those of a named network, see
    `refract.models.registry.build`; None takes the image size of the weights, else 224. DataError for an unknown model and for options
    that a bundle does not take, BundleError for a damaged bundle.
    """
    for folder in (Path(model), Path(model) / "bundle"):
        if (folder / INFO).is_file():
            if weights != "none" or image_size is not None:
                raise DataError(
                    f"--model {model} is a bundle, which has its weights and image size; omit --weights and --image-size"
                )
            return bundle_model(load_bundle(folder))
    if Path(model).is_dir():
        raise DataError(
            f"--model {model}: the folder holds neither a bundle nor a run; name one, or a network such as resnet18"
        )
    if is_in_mlflow(model):
        raise DataError(
            f"--model {model}: models of MLflow are not accepted here; name a folder, such as runs/NAME/bundle"
        )
    return _network_model(model, weights, image_size)


def bundle_model(bundle: Bundle) -> EmbeddingModel:
    info = bundle.info
    record = {"bundle": str(bundle.path.resolve()), "name": info.name}
    return embedding_model(bundle.classifier(), preprocess_of(info), info.network, info.text, record)


def reopen(key: str, record: Mapping[str, Any]) -> EmbeddingModel:
    """Build a stored model again. DataError if it is gone, or if its weights have changed."""
    name = str(record.get("bundle") or record.get("network"))
    if "bundle" in record and not Path(name).is_dir():
        raise DataError(f"{name}: the bundle that wrote these embeddings is gone; name its new folder with --model")
    model = open_model(name, str(record.get("weights", "none")), record.get("image_size"))
    if model.key != key:
        raise DataError(
            f"{name}: is not the model that wrote these embeddings, as its weights, arguments or preprocessing differ; "
            "name the right one with --model, or run `refract embed` again"
        )
    return model


def _network_model(name: str, weights: str, image_size: Size | None) -> EmbeddingModel:
    """Build a network with the preprocessing that a training's config gives it by default, so that both have the same key."""
    try:
        recorded = weights_preprocess(name, weights) or {}
        if weights == "none":
            raise ValueError("a network needs weights; add --weights default or --weights FILE, or name a bundle")
        preprocess = _default_preprocess(name, weights, image_size or recorded.get("image_size", DEFAULT_SIZE))
        size = preprocess.height, preprocess.width
        network = build(name, 1, image_size=size, weights=weights)
        arrays: dict[str, Any] = {}
        if preprocess.normalize != "channel":
            arrays = dict(folder_arrays(weights, preprocess.normalize))
        classifier = Classifier(
            network, mean=preprocess.mean, std=preprocess.std, normalize=preprocess.normalize,
            image_size=size, **arrays,
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        raise DataError(f"--model {name}: {error}") from error
    record = ModelConfig(name=name).record(size)
    return embedding_model(classifier.eval(), preprocess, record, None, network_values(name, weights, size))


def _default_preprocess(name: str, weights: str, size: Size) -> Preprocess:
    """Return the preprocessing that a training's config gives the network by default."""
    data = DataConfig(image_size=size if isinstance(size, int) else (size[0], size[1]))
    return make_preprocess(data, ModelConfig(name=name, weights=weights))


def values_of(model: ModelConfig, weights: str, preprocess: Preprocess, run_dir: Path) -> dict[str, Any]:
    """Return the record from which `reopen` builds the network of a training again.

    It is the network if name, weights and size determine it, else the bundle that the training writes. weights: `model.weights`, with a
    folder on this machine in place of a model's name.
    """
    size = (preprocess.height, preprocess.width)
    alone = weights != "none" and not model.args
    if alone and preprocess == _default_preprocess(model.name, weights, size):
        return network_values(model.name, weights, size)
    return {"bundle": str((run_dir / "bundle").resolve()), "name": run_dir.name}


def network_values(name: str, weights: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return the record from which `reopen` builds a network again. A file of weights is stored by its absolute path, a URL without its
    credentials: the masked URL names the cached download.
    """
    where = str(Path(weights).resolve()) if Path(weights).exists() else masked(weights)
    return {"network": name, "weights": where, "image_size": list(size)}
