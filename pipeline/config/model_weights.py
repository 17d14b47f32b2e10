"""The values of `model.weights` that name a model: a bundle, also at a URL, a run, a version of MLflow's registry, or a run of MLflow."""

import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from refract.models.credentials import masked
from refract.pipeline.config.config import ConfigError
from refract.remote.address import is_remote

BUNDLE, RECORD = "bundle", "bundle.json"

_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!(?:api|collections|datasets|docs|models|papers|spaces)/)"
    r"(?P<name>[^/?#]+/[^/?#]+)(?:/(?:tree|blob)/(?P<revision>[^/?#]+)(?P<path>/[^?#]+)?)?/?(?:[?#].*)?",
    re.IGNORECASE,
)


def names_model(weights: str) -> bool:
    """Whether the value names a model: its head has labels, and its batch norms have statistics of a training of Refract."""
    return is_in_mlflow(weights) or is_remote_bundle(weights) or bundle_folder(weights) is not None


def is_in_mlflow(weights: str) -> bool:
    return weights.startswith(("models:", "runs:"))


def is_remote_bundle(weights: str) -> bool:
    """Whether the value is the URL of a bundle: of a folder that is not on the Hugging Face Hub, whose repositories have weights.

    On a web server, only a name without a suffix can be a folder.
    """
    from refract.models.pretrained.weights_files import SUFFIXES, is_on_hub, is_web

    if not is_remote(weights) or is_on_hub(weights):
        return False
    name = PurePosixPath(urlsplit(weights).path)
    return not name.suffix if is_web(weights) else name.suffix not in SUFFIXES


def check_no_hub_page(weights: str) -> None:
    """Raise ConfigError if the value is the address of a page of the Hugging Face Hub, of a repository or of a file in it."""
    if (page := _HUB_PAGE.fullmatch(weights)) is not None:
        revision = "" if page["revision"] in (None, "main") else f"@{page['revision']}"
        address = f"hf://{page['name']}{revision}{(page['path'] or '').rstrip('/')}"
        raise ConfigError(f"model.weights: {masked(weights)} is a page of the Hugging Face Hub; write {address}")


def bundle_folder(weights: str) -> Path | None:
    """Return the bundle's folder if the value is the folder of a bundle or of a run; else None."""
    if weights in ("none", "default") or is_in_mlflow(weights):
        return None
    candidates = (Path(weights), Path(weights) / BUNDLE)
    return next((folder for folder in candidates if (folder / RECORD).is_file()), None)
