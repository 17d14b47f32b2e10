"""What rank 0 sends to the other ranks before a training, and their part in it."""

from pathlib import Path
from typing import Any

from refract.pipeline.data.manifest import DataError
from refract.pipeline.training.fit import Assembly, fit
from refract.pipeline.training.ranks import from_rank_0


def start_of_ranks(assembly: Assembly, run: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Return what the further ranks need to train with rank 0. trains: whether the training has epochs left."""
    return {
        "run": str(run.resolve()),
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "trains": not (run / "bundle").exists(),
        **_common(assembly),
    }


def _common(assembly: Assembly) -> dict[str, Any]:
    """Return the values that are equal on all ranks."""
    batches = {"batch_size": assembly.data.batch_size, "accumulate": assembly.accumulate}
    return {"fingerprint": assembly.identity["fingerprint"], **batches}


def train_further_rank(assembly: Assembly) -> None:
    """Train as a rank other than rank 0, which decides on the run and its checkpoint. DataError if this rank has other data."""
    start = from_rank_0(
        "start", lambda: {"run": assembly.config.trainer.runs_dir, "checkpoint": None, **_common(assembly)}
    )
    common = _common(assembly)
    if different := [key for key, value in common.items() if start[key] != value]:
        shown = ", ".join(f"{key} {common[key]}, not {start[key]}" for key in different)
        raise DataError(
            f"rank {assembly.ranks.rank} has other data or another config than rank 0 ({shown}); "
            "all machines need the same files and the same config"
        )
    if start.get("trains", True):
        fit(assembly, Path(start["run"]), None, None if start["checkpoint"] is None else Path(start["checkpoint"]))
