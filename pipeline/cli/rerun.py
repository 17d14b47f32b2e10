"""`refract rerun RUN`"""

import argparse
from pathlib import Path

from refract.models.credentials import masked
from refract.pipeline.cli import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract rerun",
        description="Train once more as a run was trained, and say whether the weights came out the same. Tells where the code, the "
        "versions or the data are others than they were.",
    )
    parser.add_argument("run", help="a run's folder, or the id of its run in MLflow")
    parser.add_argument(
        "--uri", help="the tracking server of that id; without it MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here"
    )
    args = parser.parse_args(argv)
    return console.run("rerun", lambda: _rerun(args.run, args.uri))


def _rerun(run: str, uri: str | None) -> int:
    import tempfile

    import torch

    from refract.pipeline.training.provenance import code_state, inputs, versions
    from refract.pipeline.training.run import train
    from refract.pipeline.training.run_directory import read_record, stored_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(run) if Path(run).is_dir() else _fetched(run, uri, Path(folder))
        config = stored_config(path)
        record = {"name": path.name, "runs_dir": config.trainer.runs_dir, **read_record(path)}
        weights = path / "bundle" / "weights.safetensors"
        before = weights.read_bytes() if weights.is_file() else None
        kept = "the run's code.diff" if (path / "code.diff").is_file() else "files that git does not know"
    code, _ = code_state()
    differing = [
        f"{name} was {old}, is {versions().get(name)}"
        for name, old in record["versions"].items()
        if versions().get(name) != old
    ]
    then = record.get("code") or {}
    if then.get("commit") != code.get("commit"):
        differing.append(f"the code was at commit {then.get('commit')}, is at {code.get('commit')}")
    if then.get("dirty") == "yes":
        differing.append(f"the code had changes that were not committed: {kept}")
    if code.get("dirty") == "yes":
        differing.append("the code has changes now that are not committed")
    threads = torch.get_num_threads()
    if str(threads) != (record.get("machine") or {}).get("threads", str(threads)):
        differing.append(f"PyTorch had {record['machine']['threads']} threads, has {threads}")
    now = inputs(config)
    differing += [
        f"what {key} names has changed" for key, old in (record.get("inputs") or {}).items() if now.get(key) != old
    ]
    for line in differing:
        print(f"other than then: {line}")
    config.trainer.run_name, config.trainer.runs_dir = None, record["runs_dir"]
    config.tracking.model_name = None  # it is for looking, not for serving
    result = train(config, name=f"{record['name']}-rerun")
    assert result is not None, "one process"
    fingerprint = read_record(result.run_dir)["fingerprint"]
    if fingerprint != record["fingerprint"]:
        print("other than then: the data have changed")
    after = (result.bundle / "weights.safetensors").read_bytes()
    told = "not known, as the run has no bundle any more" if before is None else "yes" if after == before else "no"
    print(f"{run} was run again as {result.run_dir}; the same weights: {told}")
    return 0


def _fetched(run_id: str, uri: str | None, folder: Path) -> Path:
    """The run's files from MLflow. TrackingError where there is no such run."""
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
            f"{run_id}: is no folder here, and no run of MLflow at {masked(server)}: {masked(str(error).splitlines()[0])}"
        ) from error
