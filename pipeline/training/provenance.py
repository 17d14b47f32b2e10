"""Collect the provenance of a run: package versions, input files, git state, machine, user and peak memory."""

import getpass
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config
from refract.pipeline.config.model_weights import bundle_folder
from refract.pipeline.config.plugin_files import plugin_digests

PACKAGES = (
    "refract", "torch", "torchvision", "timm", "lightning", "numpy", "opencv-python-headless", "simplejpeg", "pillow",
)  # fmt: skip

NAMED = ("table", "cache", "model_path", "dict_path", "from_model_name", "to_model_name")
"""Parameters of Refract's and nlpaug's ops that name a file or a folder. `keep` may name files too."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect pixels and weights."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def inputs(config: Config) -> dict[str, str]:
    """Return config key → SHA-256 of the local file or folder that it names.

    Together with the data and the config, these files determine the weights. Raises ValueError for an invalid policy.
    """
    from refract.augment.policy import load_policy
    from refract.models.pretrained.packages import package_of

    names = {
        "model.weights": str(bundle_folder(config.model.weights) or config.model.weights),
        "loss.teacher": config.loss.teacher or "",
        "data.hierarchy": config.data.hierarchy or "",
        "text.name": config.text.name,
    }
    names |= {f"augment.policy: {value}": value for value in _files(load_policy(config.augment.policy).to_spec())}
    package = package_of(config.model.name)
    if config.model.weights == "default" and package is not None and package.installed:
        names["model.weights"] = str(package.file)
    keywords = ("", "none", "default")
    digests = {key: _digest(Path(value)) for key, value in names.items() if value not in keywords and _exists(value)}
    return digests | {f"plugins: {name}": digest for name, digest in plugin_digests(config.plugins).items()}


def _files(value: Any) -> Iterator[str]:
    """Yield the strings in a policy's YAML values that may name a file or a folder."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "keep" and isinstance(item, list):
                yield from (entry for entry in item if str(entry).endswith(".txt"))
            elif key in NAMED and isinstance(item, str):
                yield item
            else:
                yield from _files(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _files(item)


def _exists(name: str) -> bool:
    try:
        return Path(name).is_file() or Path(name).is_dir()
    except (OSError, ValueError):  # the name is too long, or has a zero byte
        return False


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(path)}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def code_state() -> tuple[dict[str, str], str]:
    """Return (`commit` and `dirty` of the working folder's git repository, the uncommitted diff), both empty without a repository.

    Untracked Python files make it dirty too.
    """
    try:
        commit = _git("rev-parse", "HEAD").strip()
        # Untracked configs and images do not change the code, so only untracked Python files count.
        diff, tracked = _git("diff", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        changed = tracked or _git("ls-files", "--others", "--exclude-standard", ":(top)*.py")
    except (OSError, subprocess.SubprocessError):
        return {}, ""
    return {"commit": commit, "dirty": "yes" if changed else "no"}, diff


def machine(device: str, precision: str) -> dict[str, str]:
    """Describe the machine. device, precision: those of the training."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    threads = str(torch.get_num_threads())
    return {
        "host": platform.node(),
        "device": name,
        "cores": str(os.cpu_count()),
        "threads": threads,
        "precision": precision,
    }


def origin(command: str) -> dict[str, str]:
    """Return MLflow's tags of the user and the command of a run."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user id without a name
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": command, "mlflow.source.type": "LOCAL"}


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True).stdout


def processor() -> str:
    """Return the processor's model name, or its architecture where the system does not name the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def flat_tags(**sections: dict[str, Any]) -> dict[str, str]:
    """Flatten mappings into tags: `section.key` → text."""
    return {f"{name}.{key}": str(value) for name, section in sections.items() for key, value in section.items()}
