"""`refract train CONFIG [--section.key value …]`"""

import shlex
import sys
from typing import TYPE_CHECKING

from refract.models.credentials import masked
from refract.pipeline.cli import console
from refract.pipeline.cli.promote import by_hand, named

if TYPE_CHECKING:
    from refract.pipeline.config.config import Config
    from refract.pipeline.training.run import Result

NOT_REGISTERED = 3
"""The exit code of a training that succeeded while the registration that its config asks for did not."""


def main(argv: list[str]) -> int:
    from refract.pipeline.config.config import help_text

    argv, resume = _taken(argv, "--resume")
    if not (argv or resume) or (argv and argv[0] in ("-h", "--help")):
        print("usage: refract train CONFIG.yaml [--section.key value …] [--resume auto]")
        print("       refract train --resume RUN_DIR\n")
        print("Train as the config says; any key can be set on the command line. Everything goes below RUNS_DIR/NAME/,")
        print("the bundle to RUNS_DIR/NAME/bundle/. --resume goes on with a run that was interrupted, from its newest")
        print("checkpoint, to the weights that it would have had; auto takes the newest unfinished run of this config,")
        print(
            "or begins one. Exit codes: 0 done, 1 failed, 2 the input cannot be used, 3 trained, but the model is not"
        )
        print("registered yet (refract sync RUN_DIR registers it), 75 stopped by SIGTERM and 130 by")
        print("Ctrl-C, both after a checkpoint (Ctrl-C twice: at once). Keys, with their defaults:\n")
        print(help_text())
        return 0 if argv else 2
    if resume is None and argv[0].startswith("--"):
        print(f"refract train: the config file comes first, then options; got {argv[0]}", file=sys.stderr)
        return 2
    if resume not in (None, "auto") and argv:
        print(
            f"refract train: --resume {resume} goes on with the run's own config; got {argv[0]} as well",
            file=sys.stderr,
        )
        return 2
    if resume == "auto" and not argv:
        print("refract train: --resume auto needs the config file first", file=sys.stderr)
        return 2
    return console.run("train", lambda: _train(argv, resume))


def _taken(argv: list[str], option: str) -> tuple[list[str], str | None]:
    """(the arguments without the option, its value or None)"""
    for place, argument in enumerate(argv):
        if argument == option:
            return argv[:place] + argv[place + 2 :], (argv[place + 1] if place + 1 < len(argv) else "")
        if argument.startswith(f"{option}="):
            return argv[:place] + argv[place + 1 :], argument.partition("=")[2]
    return argv, None


def _train(argv: list[str], resume: str | None) -> int:
    from pathlib import Path

    from refract.pipeline.config.config import load_config
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.evaluation.advice import closing_notes
    from refract.pipeline.training.run import train
    from refract.pipeline.training.run_directory import stored_config, unfinished

    name = Path(argv[0]).stem if argv else "run"
    folder: Path | None
    if resume is not None and resume != "auto":
        folder = Path(resume)
        config = stored_config(folder)
    else:
        config = load_config(argv[0], argv[1:])
        folder = unfinished(config, name) if resume == "auto" else None
        config = config if folder is None else stored_config(folder)
    try:
        result = train(config, name=name, resume=folder)
    except DataError as error:
        if resume != "auto" or folder is None:
            raise
        print(f"refract train: a new run is begun: {error}", file=sys.stderr)
        result = train(load_config(argv[0], argv[1:]), name=name)
    if result is None:
        return 0
    print("hold-out: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    print(f"run:      {result.run_dir}/ (report.html, config.yaml, splits.csv, preview.png, curves.png, checkpoints/)")
    print(f"bundle:   {result.bundle}")
    here = console.bin_prefix()
    for topic, note in closing_notes(result.run_dir, config, here):
        print(f"{topic + ':':<9} {note}")
    if result.version:
        registered = named(str(config.tracking.model_name), result.version, result.alias, result.champion)
        print(f"registry: {registered}")
        if result.alias != "champion":
            command = by_hand(str(config.tracking.model_name), result.version, config.tracking.uri)
            print(f"          {console.bin_prefix()}{command} makes it champion")
    if config.tracking.enabled:
        print(f"MLflow:   {seen_at(config)}")
    run, bundle = (shlex.quote(str(path)) for path in (result.run_dir, result.bundle))
    print(f"next:     {here}refract predict {bundle} {_asked(config)}   or   {here}refract serve {bundle}")
    print(f"          {here}refract doctor {run}   or   {here}refract compare {run} OTHER_RUN")
    return _undelivered(result, config)


def seen_at(config: "Config") -> str:
    """Where the run can be looked at: the server's address, or the command that shows a database."""
    from refract.pipeline.tracking import tracking_uri

    uri = masked(tracking_uri(config.tracking))
    return uri if uri.startswith("http") else f"{console.bin_prefix()}mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _undelivered(result: "Result", config: "Config") -> int:
    """The exit code, after the last lines have said what MLflow lacks."""
    name = config.tracking.model_name if config.tracking.enabled else None
    unregistered = name is not None and result.version is None
    sync = f"{console.bin_prefix()}refract sync {shlex.quote(str(result.run_dir))}"
    if unregistered:
        why = f"MLflow refused it ({result.refused})" if result.refused else "MLflow did not answer"
        print(f"NOT REGISTERED: no version of {name} has this bundle, as {why}", file=sys.stderr)
    elif result.waiting:
        print(f"NOT TRACKED: MLflow does not have {result.waiting} entries of this run", file=sys.stderr)
    if unregistered or result.waiting:
        print(f"                {sync} delivers it", file=sys.stderr)
    return NOT_REGISTERED if unregistered else 0


def _asked(config: "Config") -> str:
    """What `refract predict` is to be given."""
    from refract.pipeline.training.build import reads

    words = {"images": "IMAGE", "texts": "--text TEXT"}
    return " ".join(words[name] for name in sorted(reads(config)))
