"""Export a bundle: convert, run by the target's own runtime, compare, and only then give the folder its name."""

import glob
import importlib
import json
import logging
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from refract.augment import ImageError, Preprocess
from refract.errors import RefractError, first_line
from refract.models.bundle.bundle import Bundle
from refract.models.conversion.deployable import Deployable
from refract.models.conversion.instruction_sets import weight_bits
from refract.pipeline.export.check import BOUND, INT8_BOUND, STORED_BOUND, Comparison, compare
from refract.pipeline.export.description import description_of
from refract.pipeline.export.int8 import (
    Accuracy,
    Int8,
    accuracy,
    calibration,
    calibration_samples,
    check_loss,
    measured_samples,
    training_remedy,
)
from refract.pipeline.export.target import ExportError, Job, Run, Target
from refract.pipeline.export.targets import TARGETS
from refract.progress import stage

DESCRIPTION = "preprocess.json"
REFERENCES = ("preprocess.py", "preprocess.js")
"""Copied from `reference/` into every export."""

ABANDONED_S = 3600
"""Age in seconds from which a temporary folder is a killed export's and is removed."""

_UNSUPPORTED = (
    re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'"),
    re.compile(r"No conversion rule found for operations: ([\w:, ]+)"),
)
"""How the converters name operators that they do not know."""


@dataclass(frozen=True)
class Exported:
    """The result of an export. sizes: path in the folder → bytes; seconds: of the conversion; accuracy, calibrated_on: for `--int8`."""

    folder: Path
    sizes: dict[str, int]
    comparison: Comparison
    seconds: float
    accuracy: Accuracy | None = None
    calibrated_on: str | None = None


def export(bundle: Bundle, to: str, folder: Path, int8: Int8 | None = None, *, runtime: Path | None = None) -> Exported:
    """Export the bundle to the target `to` of TARGETS into the new or empty folder.

    runtime: `--runtime`, for `web` the npm package, None without.
    ExportError if the folder has files, a package is missing, the target does not fit the bundle, the network has an unsupported operator,
    or the export does not return the bundle's predictions; the folder is then as before. BundleError and OSError.
    """
    target: Target = importlib.import_module(TARGETS[to]).TARGET
    _check_free(folder)
    target.check_installed()
    if int8 is not None and not target.int8:
        names = [name for name, module in TARGETS.items() if importlib.import_module(module).TARGET.int8]
        raise ExportError(f"--int8: {to} has no 8-bit integers; use --to {' or '.join(names)}")
    if bundle.info.text is not None:
        raise ExportError(
            f"{bundle.path} reads texts, which export does not support; use `refract serve`, which computes it"
        )
    if reason := target.unfit(bundle):
        raise ExportError(f"--to {to}: {reason}")
    if runtime is not None and target.runtime is None:
        raise ExportError(f"--runtime: {to} contains no runtime; remove it or use --to web")
    runtime_files = {} if target.runtime is None else target.runtime(runtime)
    network = Deployable(bundle.classifier(), task=bundle.info.task, temperature=bundle.info.temperature)
    preprocess = Preprocess.from_dict(bundle.info.preprocess)
    images = golden_images(bundle, preprocess)
    expected = _expected(bundle, network, images)
    with _temporary(folder) as part:
        return _write(bundle, target, network, preprocess, images, expected, int8, runtime_files, part, folder)


def _write(
    bundle: Bundle,
    target: Target,
    network: Deployable,
    preprocess: Preprocess,
    images: np.ndarray,
    expected: tuple[np.ndarray, np.ndarray],
    int8: Int8 | None,
    runtime: Mapping[str, bytes],
    part: Path,
    folder: Path,
) -> Exported:
    description = description_of(bundle, target)
    examples, calibrated_on = None, None
    if int8 is not None:
        calibrated = calibration_samples(int8, bundle.info)
        tested, of = measured_samples(int8.data, bundle.info, calibrated)
        examples, calibrated_on = calibration(bundle, preprocess, images, int8.calibrate, calibrated)
    stage(f"converting the network to {target.name}")
    started = time.perf_counter()
    # Converters see two images; the comparison has at least three, which shows a batch size that became constant.
    rows = np.arange(max(3, len(images))) % len(images)
    with _converting(target.name, bundle):
        target.write(Job(bundle, network, images[rows], description, examples, runtime), part)
        run = target.run(part, description)
    seconds = time.perf_counter() - started
    stage("comparing the export with the bundle")
    measured = None
    if int8 is not None:
        measured = accuracy(bundle, preprocess, images, _runner(network), run, tested, of)
        check_loss(measured, int8, target.name, bundle.info)
        description["int8"] = {
            "weight_bits": weight_bits(), "calibrated_on": calibrated_on, "measured": measured.of, "samples": measured.samples,
            "before": measured.before, "after": measured.after,
        }  # fmt: skip
    bound, remedy = (BOUND, "use another target") if int8 is None else (INT8_BOUND, _int8_remedy(int8, bundle))
    outputs = (expected[0][rows], expected[1][rows])
    comparison = compare(
        run, images[rows], outputs, bundle.info, target.name, samples=len(images), bound=bound, remedy=remedy
    )
    description["check"] = comparison._asdict()
    for name in REFERENCES:
        shutil.copyfile(Path(__file__).parent / "reference" / name, part / name)
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False)
    (part / DESCRIPTION).write_text(text + "\n", "utf-8")
    _publish(part, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return Exported(folder, sizes, comparison, seconds, measured, calibrated_on)


def _int8_remedy(int8: Int8, bundle: Bundle) -> str:
    remedies = [] if int8.calibrate else ["calibrate on training images by --calibrate SOURCE"]
    return ", or ".join([*remedies, *training_remedy(bundle.info), "export without --int8"])


def golden_images(bundle: Bundle, preprocess: Preprocess) -> np.ndarray:
    """Return the preprocessed golden samples, uint8 N×H×W×3. ExportError without golden samples, or if one cannot be decoded."""
    if not bundle.golden_samples:
        raise ExportError(
            f"{bundle.path}: has no golden samples to check an export; train again, or build the bundle with some"
        )
    images = []
    for golden in bundle.golden_samples:
        try:
            images.append(preprocess(golden.data))
        except ImageError as err:
            raise ExportError(f"{bundle.path}: golden sample {golden.name} cannot be decoded: {err}") from err
    return np.stack(images)


def _runner(network: Deployable) -> Run:
    def compute(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            probabilities, logits = network(torch.from_numpy(images))
        return probabilities.numpy(), logits.numpy()

    return compute


def _expected(bundle: Bundle, network: Deployable, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bundle's probabilities and logits on this machine. ExportError if the probabilities are not the stored ones."""
    expected, logits = _runner(network)(images)
    stored = np.array([golden.probabilities for golden in bundle.golden_samples], np.float32)
    gap = float(np.abs(expected - stored).max())
    if not gap <= STORED_BOUND:
        raise ExportError(
            f"{bundle.path}: its network changes a stored probability of the golden samples by {gap:.2g} on this machine, before any "
            f"conversion; at most {STORED_BOUND:g} is allowed: check the installed packages against `versions` in bundle.json"
        )
    return expected, logits


@contextmanager
def _converting(name: str, bundle: Bundle) -> Iterator[None]:
    """Turn an error of a converter into one sentence, and silence its remarks about its own code."""
    loud = [logging.getLogger(logger) for logger in ("root", "torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loud]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loud:
                logger.setLevel(logging.ERROR)
            yield
    except (RefractError, OSError):
        raise
    except Exception as err:
        others = ", ".join(other for other in TARGETS if other != name)
        network = bundle.info.network["name"]
        if operators := _unsupported(err):
            problem = f"{name} has no conversion of the operator{'s' * (len(operators) > 1)} {', '.join(operators)}"
        else:
            problem = f"the conversion to {name} fails: {first_line(err)}"
        raise ExportError(f"--to {name}: the network {network}: {problem}; use another target: {others}") from err
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def _unsupported(err: BaseException | None) -> list[str]:
    """List the operators that an error, or one that caused it, names as unsupported."""
    names: list[str] = []
    while err is not None:
        for pattern in _UNSUPPORTED:
            names += [name.strip() for match in pattern.findall(str(err)) for name in match.split(",")]
        err = err.__cause__ or err.__context__
    return sorted(set(filter(None, names)))


def _check_free(folder: Path) -> None:
    if folder.resolve() == Path.cwd():
        raise ExportError(f"-o {folder}: is the current folder, which export would replace; name a new folder in it")
    if folder.is_mount():
        raise ExportError(f"-o {folder}: is a mount point, which cannot be replaced; name a new folder in it")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ExportError(f"-o {folder}: is not a folder; name a new or an empty one")
    if folder.is_dir() and any(folder.iterdir()):
        raise ExportError(f"-o {folder}: has files already, and export overwrites none; remove it or name a new folder")


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Create a temporary folder next to `folder`, and remove it at the end if `_publish` has not renamed it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    for abandoned in folder.parent.glob(f"{glob.escape(prefix)}{'[0-9a-f]' * 32}.partial"):
        with suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(abandoned)
    part = folder.parent / f"{prefix}{uuid.uuid4().hex}.partial"
    try:
        part.mkdir()
        yield part
    except OSError as err:
        # No user knows the temporary folder, and a failed write to an open file names no file. An error without errno is complete.
        files = [str(name) for name in (err.filename, err.filename2) if name is not None]
        if err.errno is not None and (not files or any(Path(name).is_relative_to(part) for name in files)):
            err.filename = str(folder)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, folder: Path) -> None:
    """Rename the complete folder after a sync to the disk. ExportError if another process has written to `folder` meanwhile."""
    for file in (*part.rglob("*"), part):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    _check_free(folder)
    part.rename(folder)  # replaces an empty folder
