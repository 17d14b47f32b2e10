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
            "refract.pipeline.commands.init",
            "look at a folder or manifest of pictures and write a config for it",
        ),
        "train": ("refract.pipeline.commands.train", "train from a config; writes a run with its bundle"),
        "retrain": (
            "refract.pipeline.commands.retrain",
            "the nightly run: check the data, train, compare with the champion, promote",
        ),
        "promote": ("refract.pipeline.commands.promote", "make a registered version champion"),
        "rollback": ("refract.pipeline.commands.rollback", "make the version champion again that was before"),
        "rerun": ("refract.pipeline.commands.rerun", "train once more as a run was trained, and compare the weights"),
        "sync": ("refract.pipeline.commands.sync", "deliver to MLflow what runs kept while its server did not answer"),
        "replay-batch": (
            "refract.pipeline.commands.replay_batch",
            "run the batch again whose loss was no number, layer by layer",
        ),
        "doctor": (
            "refract.pipeline.commands.doctor",
            "what was wrong with a run, by what evidence, and what to change",
        ),
        "schedule": (
            "refract.pipeline.commands.schedule",
            "retrain by the clock on this machine; --list tells what ran and what is due",
        ),
        "tune": ("refract.pipeline.commands.tune", "search a space of configs for the best score on validation"),
        "find": ("refract.pipeline.commands.find", "find a learning rate or the largest batch for a config"),
        "evaluate": ("refract.pipeline.commands.evaluate", "measure a bundle on labelled pictures"),
        "drift": (
            "refract.pipeline.commands.drift",
            "tell whether new data are still of the kind that a bundle was measured on",
        ),
        "compare": (
            "refract.pipeline.commands.compare",
            "compare runs on the hold-out that they share, with a paired test",
        ),
        "predict": ("refract.pipeline.commands.predict", "classify pictures with a bundle"),
        "score": ("refract.pipeline.commands.score", "classify a folder or manifest of any size into a Parquet file"),
        "preview": ("refract.pipeline.commands.preview", "draw a grid of pictures and their augmented variants"),
        "paraphrase": (
            "refract.pipeline.commands.paraphrase",
            "translate the captions there and back, for the op BackTranslation",
        ),
        "augment": (
            "refract.pipeline.commands.augment",
            "write augmented copies of pictures, and plans to make them again",
        ),
        "explain": (
            "refract.pipeline.commands.explain",
            "show what a policy does to one picture, and how long each pass takes",
        ),
        "ops": ("refract.pipeline.commands.ops", "list the augmentation ops, or show one"),
        "serve": ("refract.serve.command", "answer over HTTP with a bundle"),
        "lab": ("refract.pipeline.commands.lab", "try the claims of the courses by small experiments"),
        "demo": (
            "refract.pipeline.commands.demo",
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
        module = "refract.serve.ask"  # by a server, of which the pipeline knows nothing
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
