"""`refract train CONFIG [--section.key value …]`"""

import shlex
import sys
from typing import TYPE_CHECKING

from refract import output
from refract.models.credentials import masked
from refract.pipeline import console
from refract.pipeline.cli.promote import by_hand, named

if TYPE_CHECKING:
    from pathlib import Path

    from refract.pipeline.config.config import Config
    from refract.pipeline.config.sections import TrackingConfig
    from refract.pipeline.training.folds import FoldsResult
    from refract.pipeline.training.run import Result

NOT_REGISTERED = 3
"""Exit code if training succeeded but the configured registration in MLflow failed."""


def main(argv: list[str]) -> int:
    from refract.pipeline.config.config import help_text

    argv, resume = _extract_option(argv, "--resume")
    if not (argv or resume) or (argv and argv[0] in ("-h", "--help")):
        print("usage: refract train CONFIG.yaml [--section.key value …] [--resume auto]")
        print("       refract train --resume RUN_DIR|URL\n")
        print(
            "Train a model from a config. Any key can be set on the command line. The run is written to RUNS_DIR/NAME/,"
        )
        print(
            "with its bundle in RUNS_DIR/NAME/bundle/. With --trainer.folds K, that folder has one run for each fold.\n"
        )
        print(
            "--resume RUN_DIR resumes an interrupted run from its newest checkpoint and ends with the same weights as an"
        )
        print("uninterrupted run. --resume auto resumes the newest unfinished run of this config, or starts a new run.")
        print("--resume URL downloads a run's copy, made by trainer.copy_to, to runs/NAME and resumes it.\n")
        print(
            "Exit codes: 0 done; 1 failed; 2 invalid input; 3 trained, but not registered (refract sync RUN_DIR registers"
        )
        print(
            "the model); 75 stopped by SIGTERM and 130 by Ctrl-C, both after a checkpoint. A second Ctrl-C stops at once.\n"
        )
        print("Keys, with their defaults:\n")
        print(help_text())
        return 0 if argv else 2
    if resume is None and argv[0].startswith("--"):
        print(f"refract train: got {argv[0]} first; the config file comes first, then options", file=sys.stderr)
        return 2
    if resume not in (None, "auto") and argv:
        print(
            f"refract train: --resume {resume} uses the run's config; remove {argv[0]}",
            file=sys.stderr,
        )
        return 2
    if resume == "auto" and not argv:
        print("refract train: --resume auto needs the config file first", file=sys.stderr)
        return 2
    return console.run("train", lambda: _train(argv, resume))


def _extract_option(argv: list[str], option: str) -> tuple[list[str], str | None]:
    """Return (the arguments without the option, the option's value or None)."""
    for index, argument in enumerate(argv):
        if argument == option:
            return argv[:index] + argv[index + 2 :], (argv[index + 1] if index + 1 < len(argv) else "")
        if argument.startswith(f"{option}="):
            return argv[:index] + argv[index + 1 :], argument.partition("=")[2]
    return argv, None


def _train(argv: list[str], resume: str | None) -> int:
    from pathlib import Path

    from refract.pipeline.config.config import load_config
    from refract.pipeline.data.errors import DataChanged, DataError
    from refract.pipeline.training.attempt import restarted
    from refract.pipeline.training.fetched_run import copy_of, with_copy_at
    from refract.pipeline.training.rank_failure import stop_without_launcher
    from refract.pipeline.training.ranks import by_torchrun
    from refract.pipeline.training.run_directory import stored_config

    stop_without_launcher()
    name = Path(argv[0]).stem if argv else "run"
    folder: Path | None
    if resume is not None and resume != "auto":
        folder = _run_folder(resume)
        config = with_copy_at(stored_config(folder), folder, copy_of(resume))
    else:
        config = load_config(argv[0], argv[1:])
        if resume is None and by_torchrun() and restarted():
            resume = "auto"  # torchrun's --max-restarts repeats the command line
        folder = _unfinished_of_rank_0(config, name) if resume == "auto" else None
        if folder is not None:
            config = with_copy_at(stored_config(folder), folder, config.trainer.copy_to)
    run = _run_folds if config.trainer.folds and config.trainer.fold is None else _run
    try:
        return run(config, name, folder)
    except DataError as error:
        # Of several ranks, all must start the new run, but a bad image is the error of one of them.
        alone = not by_torchrun() and config.trainer.devices == 1
        if resume != "auto" or folder is None or not (alone or isinstance(error, DataChanged)):
            raise
        print(f"refract train: starting a new run: {error}", file=sys.stderr)
        return run(load_config(argv[0], argv[1:]), name, None)


def _run_folder(resume: str) -> "Path":
    """Return the folder of the run to resume. Rank 0 downloads a run at a URL for all ranks."""
    from pathlib import Path

    from refract.pipeline.config.sections import TrainerConfig
    from refract.pipeline.training.fetched_run import fetch
    from refract.pipeline.training.ranks import from_rank_0
    from refract.remote.address import is_remote

    if not is_remote(resume):
        return Path(resume)
    return Path(from_rank_0("resume", lambda: str(fetch(resume, Path(TrainerConfig().runs_dir)))))


def _unfinished_of_rank_0(config: "Config", name: str) -> "Path | None":
    """Return the run that all ranks resume, None to start a new one."""
    from pathlib import Path

    from refract.pipeline.training.fetched_run import fetch_unfinished, up_to_date
    from refract.pipeline.training.ranks import from_rank_0
    from refract.pipeline.training.run_directory import unfinished

    def decide() -> str | None:
        run = unfinished(config, name)
        if run is not None and config.trainer.copy_to is not None:
            up_to_date(run, f"{config.trainer.copy_to.rstrip('/')}/{run.name}")
            run = unfinished(config, name)  # another machine may have finished it
        if run is None:
            run = fetch_unfinished(config, name)
        return None if run is None else str(run)

    path = from_rank_0("resume", decide)
    return None if path is None else Path(path)


def _run(config: "Config", name: str, folder: "Path | None") -> int:
    """Train, or resume the run in `folder`; print the result, and return the exit code."""
    from refract.pipeline.evaluation.advice import closing_notes
    from refract.pipeline.training.run import train

    result = train(config, name=name, resume=folder)
    if result is None:
        return 0
    output.result({**vars(result), "model": config.tracking.model_name})
    print("test:     " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    preview = "preview.png, " if config.evaluation.images else ""
    files = f"report.html, config.yaml, splits.csv, {preview}curves.png"
    print(f"run:      {result.run_dir}/ ({files}{'' if config.model.on_embeddings else ', checkpoints/'})")
    print(f"bundle:   {result.bundle}")
    prefix = console.bin_prefix()
    for topic, note in closing_notes(
        result.run_dir, config.evaluation, prefix, source=config.data.source, images=config.model.reads_images
    ):
        print(f"{topic + ':':<9} {note}")
    if result.version:
        registered = named(str(config.tracking.model_name), result.version, result.alias, result.champion)
        print(f"registry: {registered}")
        if result.alias != "champion":
            command = by_hand(str(config.tracking.model_name), result.version, config.tracking.uri)
            print(f"          {prefix}{command} makes it champion")
    if config.tracking.enabled:
        print(f"MLflow:   {mlflow_hint(config.tracking)}")
    if config.trainer.copy_to is not None:
        print(f"copy:     {config.trainer.copy_to.rstrip('/')}/{result.run_dir.name}/")
    if not output.is_quiet():
        _print_next_commands(result, config.reads, prefix)
    model = config.tracking.model_name if config.tracking.enabled else None
    return _report_not_copied(result) or _report_undelivered(result, model)


def _run_folds(config: "Config", name: str, folder: "Path | None") -> int:
    """Train the folds, or resume those in `folder`; print the result, and return the exit code."""
    from refract.pipeline.evaluation.folds import OUT_OF_FOLD
    from refract.pipeline.training.folds import train_folds

    result = train_folds(config, name=name, resume=folder)
    run_dir, assessment, count = result.run_dir, result.assessment, config.trainer.folds
    output.result({"run_dir": run_dir, **assessment.report.numbers["folds"], "likely_label_errors": assessment.label_errors,
                   "waiting": result.waiting})  # fmt: skip
    print(f"mean and standard deviation over {count} folds, with the 95 % interval of the mean:")
    width = max(map(len, assessment.test))
    for part, metrics in (("out of fold", assessment.out_of_fold), ("test set", assessment.test)):
        print(f"  {part}:")
        for metric, spread in metrics.items():
            interval = f"{spread.low:.4f} to {spread.high:.4f}"
            print(f"    {metric:<{width}}  {spread.mean:.4f} ± {spread.deviation:.4f}  ({interval})")
    print(f"labels:   {len(assessment.label_errors)} samples have a label that is likely wrong; report.html shows them")
    print(f"folds:    {run_dir}/ (report.html, report.json, {OUT_OF_FOLD}, and the runs fold-1 … fold-{count})")
    prefix = console.bin_prefix()
    print("serve:    none of these bundles: the folds estimate the quality. Train one model on the same data with")
    print(f"          --trainer.folds 0; {prefix}refract soup averages several such runs")
    if config.tracking.model_name:
        print(f"registry: no version of {config.tracking.model_name}, as folds register none")
    if config.tracking.enabled:
        print(f"MLflow:   {mlflow_hint(config.tracking)}")
    if result.waiting:
        print(f"NOT TRACKED: MLflow does not have {result.waiting} entries of this run", file=sys.stderr)
        print(f"                {prefix}refract sync {shlex.quote(str(run_dir))} delivers it", file=sys.stderr)
    return _report_not_copied(result)


def _print_next_commands(result: "Result", reads: frozenset[str], prefix: str) -> None:
    """reads: the modalities that the network reads, for the arguments of `refract predict`."""
    placeholders = {"images": "IMAGE", "texts": "--text TEXT"}
    arguments = " ".join(placeholders[name] for name in sorted(reads))
    run, bundle = (shlex.quote(str(path)) for path in (result.run_dir, result.bundle))
    print(f"next:     {prefix}refract predict {bundle} {arguments}   or   {prefix}refract serve {bundle}")
    print(f"          {prefix}refract doctor {run}   or   {prefix}refract compare {run} OTHER_RUN")


def mlflow_hint(tracking: "TrackingConfig") -> str:
    """Return the URL of the MLflow server, or the command that opens the MLflow UI on a database."""
    from refract.pipeline.tracking import tracking_uri

    uri = masked(tracking_uri(tracking))
    return uri if uri.startswith("http") else f"{console.bin_prefix()}mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _report_undelivered(result: "Result", model: str | None) -> int:
    """Print the entries that MLflow lacks, and return the exit code. model: name of the registered model, None without one."""
    unregistered = model is not None and result.version is None
    sync = f"{console.bin_prefix()}refract sync {shlex.quote(str(result.run_dir))}"
    if unregistered:
        reason = f"MLflow refused it ({result.refused})" if result.refused else "MLflow did not answer"
        print(f"NOT REGISTERED: no version of {model} has this bundle: {reason}", file=sys.stderr)
    elif result.waiting:
        print(f"NOT TRACKED: MLflow does not have {result.waiting} entries of this run", file=sys.stderr)
    if unregistered or result.waiting:
        print(f"                {sync} delivers it", file=sys.stderr)
    return NOT_REGISTERED if unregistered else 0


def _report_not_copied(result: "Result | FoldsResult") -> int:
    """Print why the copy of the run is not complete, and return the exit code."""
    if result.not_copied is None:
        return 0
    print(f"NOT COPIED: {result.not_copied}", file=sys.stderr)
    print(
        f"            {console.bin_prefix()}refract sync {shlex.quote(str(result.run_dir))} completes it",
        file=sys.stderr,
    )
    return 1
