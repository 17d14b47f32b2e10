"""The command line: `refract COMMAND …`. Nothing heavy is imported until a command runs."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from refract.models.credentials import hide_credentials

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "init": (
            "refract.pipeline.cli.init",
            "look at a folder or manifest of images and write a config for it",
        ),
        "train": ("refract.pipeline.cli.train", "train from a config; writes a run with its bundle"),
        "retrain": (
            "refract.pipeline.cli.retrain",
            "the nightly run: check the data, train, compare with the champion, promote",
        ),
        "promote": ("refract.pipeline.cli.promote", "make a registered version champion"),
        "rollback": ("refract.pipeline.cli.rollback", "make the version champion again that was before"),
        "rerun": ("refract.pipeline.cli.rerun", "train once more as a run was trained, and compare the weights"),
        "sync": ("refract.pipeline.cli.sync", "deliver to MLflow what runs kept while its server did not answer"),
        "replay-batch": (
            "refract.pipeline.cli.replay_batch",
            "run the batch again whose loss was no number, layer by layer",
        ),
        "doctor": (
            "refract.pipeline.cli.doctor",
            "what was wrong with a run, by what evidence, and what to change",
        ),
        "schedule": (
            "refract.pipeline.cli.schedule",
            "retrain by the clock on this machine; --list tells what ran and what is due",
        ),
        "tune": ("refract.pipeline.cli.tune", "search a space of configs for the best score on validation"),
        "find": ("refract.pipeline.cli.find", "find a learning rate or the largest batch for a config"),
        "evaluate": ("refract.pipeline.cli.evaluate", "measure a bundle on labelled images"),
        "drift": (
            "refract.pipeline.cli.drift",
            "tell whether new data are still of the kind that a bundle was measured on",
        ),
        "compare": (
            "refract.pipeline.cli.compare",
            "compare runs on the hold-out that they share, with a paired test",
        ),
        "predict": ("refract.pipeline.cli.predict", "classify images with a bundle"),
        "score": ("refract.pipeline.cli.score", "classify a folder or manifest of any size into a Parquet file"),
        "preview": ("refract.pipeline.cli.preview", "draw a grid of images and their augmented variants"),
        "paraphrase": (
            "refract.pipeline.cli.paraphrase",
            "translate the captions there and back, for the op BackTranslation",
        ),
        "augment": (
            "refract.pipeline.cli.augment",
            "write augmented copies of images, and plans to make them again",
        ),
        "explain": (
            "refract.pipeline.cli.explain",
            "show what a policy does to one image, and how long each pass takes",
        ),
        "ops": ("refract.pipeline.cli.ops", "list the augmentation ops, or show one"),
        "serve": ("refract.serve.cli.command", "answer over HTTP with a bundle"),
        "lab": ("refract.pipeline.cli.lab", "try the claims of the courses by small experiments"),
        "demo": (
            "refract.pipeline.cli.demo",
            "the whole way on the embedded digits: train, track, register, serve, ask",
        ),
    }
)
"""Command → (the module whose `main(argv) -> int` runs it, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 the user's input cannot be used, 3 trained but not registered, 20 refused
    by thresholds, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"refract {version('refract')}")
        return 0
    if arguments[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"refract: no command {arguments[0]!r}.{hint} Known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if arguments[0] != "serve":  # the default waits minutes for a server that is not there; serving waits less still
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        prepare_to_compute()
    hide_credentials()
    module = COMMANDS[arguments[0]][0]
    if arguments[0] == "predict" and any(argument.partition("=")[0] == "--url" for argument in arguments):
        module = "refract.serve.cli.predict"  # by a server, of which the pipeline knows nothing
    try:
        return importlib.import_module(module).main(arguments[1:])
    except ModuleNotFoundError as err:
        if err.name is None or importlib.util.find_spec("lightning"):
            raise
        told = f"{err.name} is not installed; pip install refract[train], or what the README's make does"
        print(f"refract {arguments[0]}: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrefract: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `refract predict … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 — the interpreter flushes it on exit
        return 0


def prepare_to_compute() -> None:
    """Set how the process waits and keeps memory, before PyTorch is imported. The server has settings of its own."""
    from refract.models.allocator import keep_freed_memory
    from refract.models.openmp import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    keep_freed_memory()


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: refract COMMAND …",
            "",
            "Images in, a served classifier out.",
            "",
            *lines,
            "",
            "refract COMMAND --help tells a command's options.",
        ]
    )
