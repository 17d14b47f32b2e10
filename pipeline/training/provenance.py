"""What a reviewer asks of a run beside its figures: which code, which machine, what it cost."""

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

PACKAGES = (
    "refract", "torch", "torchvision", "timm", "lightning", "numpy", "opencv-python-headless", "simplejpeg", "pillow",
)  # fmt: skip

NAMED = ("table", "cache", "model_path", "dict_path", "from_model_name", "to_model_name")
"""Parameters of ops, ours and nlpaug's, that name a file or a folder; `keep` may, too."""


def versions() -> dict[str, str]:
    """Of Python and of what decides about pixels and weights."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def inputs(config: Config) -> dict[str, str]:
    """config key → SHA-256 of the file or folder here that it names: what shapes the weights beside the data and the config. ValueError for
    a policy that is none."""
    from refract.augment.policy import load_policy

    named = {
        "model.weights": config.model.weights,
        "loss.teacher": config.loss.teacher or "",
        "text.name": config.text.name,
    }
    named |= {f"augment.policy: {value}": value for value in _files(load_policy(config.augment.policy).to_spec())}
    words = ("", "none", "default")
    return {key: _digest(Path(value)) for key, value in named.items() if value not in words and _is_there(value)}


def _files(value: Any) -> Iterator[str]:
    """What may be a file's or folder's name in a policy, as YAML holds it."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if key == "keep" and isinstance(one, list):
                yield from (entry for entry in one if str(entry).endswith(".txt"))
            elif key in NAMED and isinstance(one, str):
                yield one
            else:
                yield from _files(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _files(one)


def _is_there(name: str) -> bool:
    try:
        return Path(name).is_file() or Path(name).is_dir()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte
        return False


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(path)}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def code_state() -> tuple[dict[str, str], str]:
    """(`commit` and `dirty` of the git repository that holds the working folder, what is not committed as a diff); empty outside of one.
    Python files that git does not know make it dirty too."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        # Of what git does not know, code alone counts: a config or an image beside it changes nothing.
        diff, known = _git("diff", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        changed = known or _git("ls-files", "--others", "--exclude-standard", ":(top)*.py")
    except (OSError, subprocess.SubprocessError):
        return {}, ""
    return {"commit": commit, "dirty": "yes" if changed else "no"}, diff


def machine(device: str, precision: str) -> dict[str, str]:
    """device, precision: as the training uses them."""
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
    """MLflow's own tags of who ran what."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": command, "mlflow.source.type": "LOCAL"}


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, errors="replace", timeout=20, check=True)
    return done.stdout


def processor() -> str:
    """The model's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def flat_tags(**sections: dict[str, Any]) -> dict[str, str]:
    """`section.key` → text, of several mappings."""
    return {f"{name}.{key}": str(value) for name, section in sections.items() for key, value in section.items()}
