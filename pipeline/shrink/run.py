"""Run a shrink: train the candidates, export them in 8-bit integers, measure all, choose one and write it."""

import contextlib
import importlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from refract.errors import RefractError
from refract.models.bundle.bundle import Bundle
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.export.target import ExportError, Target
from refract.pipeline.export.targets import TARGETS
from refract.pipeline.files import locked, write_atomically
from refract.pipeline.shrink.candidates import Candidate, ShrinkError, config_of
from refract.pipeline.shrink.measure import Contender, contender, measure
from refract.pipeline.shrink.plan import LOCK, RESULT, check_folder, config_of_bundle, open_plan, prepare
from refract.pipeline.shrink.table import Choice, Row, choose, sorted_rows, to_json
from refract.pipeline.training.device import choose_device, choose_precision
from refract.pipeline.training.provenance import machine, versions
from refract.plugins import load
from refract.progress import staged

log = logging.getLogger(__name__)

RUNS, EXPORTS, BUNDLE = "runs", "int8", "bundle"
ORIGINAL = "bundle"
"""The name of the original among the candidates."""

INT8 = ("onnx", "openvino")
"""Targets of the exports in 8-bit integers."""

Prepared = tuple[Manifest, dict[str, str]]


@dataclass(frozen=True)
class Shrunk:
    """The result of a shrink. rows: the fastest first; choice: of them; failed: (candidate, reason) of those without a row."""

    folder: Path
    rows: list[Row]
    choice: Choice
    failed: list[tuple[str, str]]
    numbers: dict[str, Any]

    @property
    def bundle(self) -> Path:
        """The folder of the chosen classifier."""
        return self.folder / BUNDLE


def shrink(
    bundle: Bundle,
    folder: Path,
    *,
    budget_ms: float,
    max_loss: float,
    networks: Sequence[str] = (),
    source: str | None = None,
    plugins: Sequence[str] = (),
) -> Shrunk:
    """Shrink the bundle into the folder, which is new, empty, or that of the same shrink, whose finished trainings are kept.

    budget_ms: largest latency of one image, above 0; max_loss: largest loss of accuracy, in percentage points; networks: see
    `named_candidates`, empty for the default ones; source: of the data, None for the one of the bundle's config.
    ShrinkError, and the errors of `train` but ConfigError, which excludes a candidate.
    """
    check_folder(folder)
    config = config_of_bundle(bundle, source, plugins)
    load(config.plugins)
    prepared = prepare(bundle, config)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(
        folder / LOCK, ShrinkError(f"-o {folder}: another process shrinks into it; wait, or name a new folder")
    ):
        plan = open_plan(folder, bundle, config, networks, prepared[1]["fingerprint"])
        bundles, failed = _trained(plan.candidates, bundle, config, prepared, folder)
        contenders, unexported = _contenders(bundle, bundles, prepared[0], folder)
        (folder / RESULT).unlink(missing_ok=True)
        with staged("measuring the candidates"):
            samples = prepared[0].of("test")
            rows = sorted_rows(measure(contenders, samples, choose_device(config.trainer.device), folder))
        choice = choose(rows, budget_ms, max_loss)
        _write_chosen(choice.chosen, folder)
        failed += unexported
        numbers = {
            "format_version": 1, "created_by": f"refract {version('refract')}", "bundle": bundle.digest, "path": str(bundle.path),
            "budget_ms": budget_ms, "max_loss": max_loss, "networks": list(networks), "data": prepared[0].source, "split": "test",
            "samples": len(samples), "machine": machine("cpu", choose_precision(config.trainer, "cpu")), "versions": versions(),
            "rows": to_json(rows, choice.chosen, max_loss), "failed": [list(entry) for entry in failed],
            "chosen": None if choice.chosen is None else choice.chosen.title(),
            "nearest": None if choice.nearest is None else choice.nearest.title(),
        }  # fmt: skip
        write_atomically(folder / RESULT, (json.dumps(numbers, indent=1, ensure_ascii=False) + "\n").encode())
    return Shrunk(folder, rows, choice, failed, numbers)


def _trained(
    candidates: Sequence[Candidate], bundle: Bundle, config: Config, prepared: Prepared, folder: Path
) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """Train the candidates. Returns (name → folder of the bundle, (name, reason) of those that cannot be trained)."""
    bundles, failed = {}, []
    for number, candidate in enumerate(candidates, 1):
        log.info("candidate %d of %d: %s", number, len(candidates), candidate.name)
        own_config = config_of(candidate, bundle, config, str(folder / RUNS))
        try:
            bundles[candidate.name] = _train(own_config, folder / RUNS / candidate.name, prepared)
        except ConfigError as err:
            log.warning("%s is skipped: %s", candidate.name, err)
            failed.append((candidate.name, str(err)))
    if failed and not bundles:
        raise ShrinkError(f"no candidate can be trained: {'; '.join(f'{name}: {reason}' for name, reason in failed)}")
    return bundles, failed


def _train(config: Config, run: Path, prepared: Prepared) -> Path:
    """Train a candidate, resume it, or do nothing if it is finished. Returns the folder of its bundle."""
    from refract.pipeline.training.run import train
    from refract.pipeline.training.run_directory import RECORD, read_record, stored_config

    if run.exists() and not (run / RECORD).exists():
        shutil.rmtree(run)  # the process was killed before the first record
    if not run.exists():
        train(config, prepared=prepared)
    elif not read_record(run).get("finished"):
        train(stored_config(run), resume=run, prepared=prepared)
    return run / "bundle"


def _contenders(
    original: Bundle, bundles: dict[str, Path], data: Manifest, folder: Path
) -> tuple[list[Contender], list[tuple[str, str]]]:
    """Return (the original first, then the trained bundles, and the exports of all in 8-bit integers; (title, reason) of failed ones)."""
    contenders = [contender(ORIGINAL, original), *(contender(name, path) for name, path in bundles.items())]
    exports, failed = [], []
    for each in contenders:
        for target in _targets():
            path = folder / EXPORTS / f"{each.name}-{target.name}"
            title = f"{each.name} int8 ({target.name})"
            try:
                _export(each.bundle, target, path, data)
                exports.append(Contender(each.name, each.bundle, target, path))
            except RefractError as err:
                log.warning("%s is skipped: %s", title, err)
                failed.append((title, str(err)))
    return [*contenders, *exports], failed


def _targets() -> list[Target]:
    """Return the targets of INT8 whose packages are installed."""
    installed = []
    for target in (importlib.import_module(TARGETS[name]).TARGET for name in INT8):
        with contextlib.suppress(ExportError):
            target.check_installed()
            installed.append(target)
    return installed


def _export(bundle: Bundle, target: Target, path: Path, data: Manifest) -> None:
    """Export the bundle in 8-bit integers, if the folder has no export: `measure` decides about the accuracy."""
    from refract.pipeline.export.export import DESCRIPTION, export
    from refract.pipeline.export.int8 import Int8

    if (path / DESCRIPTION).exists():
        return
    options = Int8(calibrate=data.source, data=None, max_loss=100.0, samples=data.of("train"))
    with staged(f"exporting {path.name}"):
        export(bundle, target.name, path, options)


def _write_chosen(chosen: Row | None, folder: Path) -> None:
    """Copy the chosen classifier to `bundle`; without one, remove that of an earlier budget."""
    target, part, old = folder / BUNDLE, folder / f".{BUNDLE}.partial", folder / f".{BUNDLE}.old"
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if chosen is not None:
        shutil.copytree(folder / chosen.folder, part)
    if target.exists():
        target.rename(old)
    if chosen is not None:
        part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
