"""`refract rerun RUN`"""

import argparse
from pathlib import Path

from refract import output
from refract.models.credentials import masked
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract rerun",
        description="Repeat a run's training, and report whether the weights are identical. Reports differences in code, library "
        "versions, threads and data.",
    )
    parser.add_argument("run", help="run folder, or MLflow run ID")
    parser.add_argument(
        "--uri", help="MLflow server of that ID (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in this folder)"
    )
    args = parser.parse_args(argv)
    return console.run("rerun", lambda: _rerun(args.run, args.uri))


def _rerun(run: str, uri: str | None) -> int:
    import tempfile

    import torch

    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.retraining.stored_snapshots import is_removed
    from refract.pipeline.training.provenance import code_state, inputs, versions
    from refract.pipeline.training.run import train
    from refract.pipeline.training.run_directory import read_record, stored_config
    from refract.plugins import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(run) if Path(run).is_dir() else _downloaded(run, uri, Path(folder))
        config = stored_config(path)
        if not Path(run).is_dir() and (
            files := [Path(entry).name for entry in config.plugins if entry.endswith(".py")]
        ):
            raise ConfigError(
                f"{run}: the run needs the plugins {', '.join(files)}, which MLflow does not store; give the run's folder instead of its ID"
            )
        if config.trainer.folds and config.trainer.fold is None:
            raise ConfigError(
                f"{run}: has the runs of {config.trainer.folds} folds; repeat one of them, such as {run}/fold-1"
            )
        if is_removed(Path(config.data.source)):
            raise ConfigError(
                f"{run}: cannot be repeated, as its data are gone: {config.data.source}. `refract retrain` removes old snapshots by "
                "retrain.keep_snapshots; null keeps those of later runs"
            )
        load(config.plugins)
        record = {"name": path.name, "runs_dir": config.trainer.runs_dir, **read_record(path)}
        weights = path / "bundle" / "weights.safetensors"
        before = weights.read_bytes() if weights.is_file() else None
        changes = "the run's code.diff" if (path / "code.diff").is_file() else "untracked files"
    code, _ = code_state()
    differing = [
        f"{name} was {old}, is now {versions().get(name)}"
        for name, old in record["versions"].items()
        if versions().get(name) != old
    ]
    old_code = record.get("code") or {}
    if old_code.get("commit") != code.get("commit"):
        differing.append(f"the code was at commit {old_code.get('commit')}, is now at {code.get('commit')}")
    if old_code.get("dirty") == "yes":
        differing.append(f"the code had uncommitted changes: {changes}")
    if code.get("dirty") == "yes":
        differing.append("the code now has uncommitted changes")
    threads = torch.get_num_threads()
    if str(threads) != (record.get("machine") or {}).get("threads", str(threads)):
        differing.append(f"PyTorch had {record['machine']['threads']} threads, has now {threads}")
    present = inputs(config)
    differing += [
        f"the file of {key} has changed" for key, old in (record.get("inputs") or {}).items() if present.get(key) != old
    ]
    for line in differing:
        print(f"different: {line}")
    # The repeated run is not registered.
    unnamed = {"trainer.run_name": None, "trainer.runs_dir": record["runs_dir"], "tracking.model_name": None}
    result = train(config.changed(unnamed), name=f"{record['name']}-rerun")
    assert result is not None, "rerun trains in one process"
    fingerprint = read_record(result.run_dir)["fingerprint"]
    if fingerprint != record["fingerprint"]:
        differing.append("the data have changed")
        print(f"different: {differing[-1]}")
    after = (result.bundle / "weights.safetensors").read_bytes()
    same = "unknown, as the run's bundle is missing" if before is None else "yes" if after == before else "no"
    output.result({"run": run, "repeated": result.run_dir, "identical": same, "differences": differing})
    print(f"{run} was repeated as {result.run_dir}; identical weights: {same}")
    return 0


def _downloaded(run_id: str, uri: str | None, folder: Path) -> Path:
    """Download the run's files from MLflow. TrackingError if the run does not exist."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from refract.pipeline.config.sections import TrackingConfig
    from refract.pipeline.tracking import TrackingError, tracking_uri

    server = uri or tracking_uri(TrackingConfig())
    try:
        client = MlflowClient(server)
        client.get_run(run_id)
        return Path(client.download_artifacts(run_id, "", str(folder)))
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"{run_id}: neither a folder nor a run of MLflow at {masked(server)}: {masked(str(error).splitlines()[0])}"
        ) from error
