"""The command line: `refract COMMAND …`. Heavy modules are imported only when a command runs."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from refract import output
from refract.errors import RefractError
from refract.models.credentials import hide_credentials
from refract.plugins import PluginError, add_entry, load
from refract.progress import silence_reported

GROUPS: Mapping[str, Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "Start": {
            "init": ("refract.pipeline.cli.init", "Write a config for a folder or manifest of images"),
            "demo": ("refract.pipeline.cli.demo", "Train, track, register and serve a model of the embedded digits"),
            "completion": ("refract.completion", "Print the completion script of bash, zsh or fish"),
            "lab": ("refract.pipeline.cli.lab", "Test textbook claims about deep learning by small experiments"),
        },
        "Train": {
            "train": ("refract.pipeline.cli.train", "Train a model from a config; write a run with its bundle"),
            "torchrun": ("refract.pipeline.cli.torchrun", "Train with several ranks, on one machine or several"),
            "soup": ("refract.pipeline.cli.soup", "Average the weights of runs of one network into one bundle"),
            "shrink": (
                "refract.pipeline.cli.shrink",
                "Distil a bundle into smaller networks; choose one within a latency budget",
            ),
            "tune": ("refract.pipeline.cli.tune", "Search a space of configs for the best validation score"),
            "config": ("refract.pipeline.cli.config", "Print the config keys, or their JSON Schema for editors"),
            "find": ("refract.pipeline.cli.find", "Find a learning rate or the largest batch size for a config"),
            "profile": ("refract.pipeline.cli.profile", "Time the stages of a training and find its bottleneck"),
            "pack": ("refract.pipeline.cli.pack", "Write a data set to a few large tars, also with smaller images"),
            "rerun": ("refract.pipeline.cli.rerun", "Repeat a training run and compare the weights"),
            "replay-batch": (
                "refract.pipeline.cli.replay_batch",
                "Run a batch with a non-finite loss again, layer by layer",
            ),
            "sync": (
                "refract.pipeline.cli.sync",
                "Send stored results of runs to MLflow after an outage of its server",
            ),
        },
        "Evaluate": {
            "evaluate": ("refract.pipeline.cli.evaluate", "Measure a bundle on labelled images"),
            "compare": ("refract.pipeline.cli.compare", "Compare runs on their common test set by a paired test"),
            "drift": ("refract.pipeline.cli.drift", "Check new data for drift against a bundle's reference data"),
            "doctor": ("refract.pipeline.cli.doctor", "Diagnose a training run: problems, evidence and remedies"),
        },
        "Predict": {
            "predict": ("refract.pipeline.cli.predict", "Classify images with a bundle or by a server"),
            "score": ("refract.pipeline.cli.score", "Classify a folder or manifest of any size into a Parquet file"),
            "serve": ("refract.serve.cli.command", "Serve a bundle's predictions over HTTP"),
            "export": (
                "refract.pipeline.cli.export",
                "Write a bundle's network for ONNX, OpenVINO, torch.export, timm, Triton or browsers",
            ),
            "feedback": ("refract.serve.cli.feedback", "Send true labels of earlier predictions to a server"),
        },
        "Features": {
            "embed": ("refract.pipeline.cli.embed", "Compute embeddings of images into a feature store"),
            "search": (
                "refract.pipeline.cli.search",
                "Find the images of a feature store that are most similar to an image",
            ),
        },
        "Labels": {
            "review": ("refract.pipeline.cli.review", "Review labels in the browser, the likely errors first"),
            "labels": (
                "refract.pipeline.cli.labels",
                "List, compare, record, import and export decisions on labels",
            ),
        },
        "Retrain": {
            "retrain": (
                "refract.pipeline.cli.retrain",
                "Check the data, train, compare with the champion and promote (the nightly job)",
            ),
            "schedule": (
                "refract.pipeline.cli.schedule",
                "Retrain on a cron schedule on this machine; list past and due runs",
            ),
            "promote": ("refract.pipeline.cli.promote", "Make a registered model version the champion"),
            "rollback": ("refract.pipeline.cli.rollback", "Make the previous champion the champion again"),
        },
        "Augment": {
            "ops": ("refract.pipeline.cli.ops", "List the augmentation ops, or describe one"),
            "preview": ("refract.pipeline.cli.preview", "Draw a grid of images and their augmented variants"),
            "explain": (
                "refract.pipeline.cli.explain",
                "Show the steps of a policy for one image, and the time of each",
            ),
            "augment": (
                "refract.pipeline.cli.augment",
                "Write augmented copies of images, and the plans that reproduce them",
            ),
            "paraphrase": (
                "refract.pipeline.cli.paraphrase",
                "Paraphrase texts by back-translation, for the op BackTranslation",
            ),
        },
    }
)
"""Heading of `refract --help` → command → (the module whose `main(argv) -> int` runs the command, one line of help)."""

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {name: entry for commands in GROUPS.values() for name, entry in commands.items()}
)
"""Command → (module, one line of help), of all groups."""


FIRST_STEPS = """\
New here? Try the example, then your images, in one folder for each label:
  refract demo                           train, track and serve a model of handwritten digits
  refract init FOLDER -o my.yaml         write a config for your images
  refract train my.yaml                  train; the last lines name the report, the bundle and the next commands
  refract predict RUN/bundle IMAGE       classify an image with the trained bundle
  refract serve RUN/bundle               serve predictions over HTTP"""
"""What `refract` without arguments prints first."""


LAST_LINE = "`refract COMMAND --help` lists the options of a command. Each accepts --quiet and --verbose, and all but completion --json."


_plugin_commands: dict[str, Callable[[list[str]], int]] = {}


def register_command(name: str, run: Callable[[list[str]], int]) -> None:
    """Add the command of a plugin. PluginError if another command has the name."""
    if name in COMMANDS:
        raise PluginError(f"the command {name!r} exists already, in {COMMANDS[name][0]}; rename the new command")
    add_entry("command", _plugin_commands, name, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0 done, 1 failed, 2 invalid input; docs/reference/exit-codes.md lists all.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # `refract predict … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 — the interpreter flushes it on exit
        return 0


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0].partition("=")[0] == "--plugin":
        return _main_with_plugins(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help() if arguments else f"{FIRST_STEPS}\n\n{_help()}")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"refract {version('refract')}")
        return 0
    if arguments[0] not in COMMANDS:
        import difflib

        matches = difflib.get_close_matches(arguments[0], [*COMMANDS, *_plugin_commands], n=1)
        hint = f"; did you mean {matches[0]!r}?" if matches else ""
        problem = "no command before the option" if arguments[0].startswith("-") else "no command"
        print(f"refract: {problem} {arguments[0]!r}{hint} (`refract --help` lists the commands)", file=sys.stderr)
        return 2
    return _with_output_options(arguments[0], arguments[1:])


def _with_output_options(command: str, arguments: Sequence[str]) -> int:
    """Take the output options from the arguments and run the command with them. Its `--help` lists them after its own options."""
    try:
        modes, rest = output.split(command, arguments)
        with output.applied(modes):
            output.check_variable()
            with silence_reported(command):
                return _run(command, rest)
    except output.OutputOptionError as error:
        print(f"refract {command}: {error}", file=sys.stderr)
        return 2
    finally:
        if {"-h", "--help"} & {*arguments}:
            print(output.help_of(command))


def _run(command: str, arguments: list[str]) -> int:
    _set_environment(command)
    try:
        if command in _plugin_commands:
            return _plugin_commands[command](arguments)
        module = COMMANDS[command][0]
        if command == "predict" and any(argument.partition("=")[0] == "--url" for argument in arguments):
            module = "refract.serve.cli.predict"  # predict by a server; the pipeline does not import `serve`
        return importlib.import_module(module).main(arguments)
    except ModuleNotFoundError as err:
        if err.name is None or importlib.util.find_spec("lightning"):
            raise
        message = f"{err.name} is not installed; run pip install 'refract[train]', or `make install` in a clone"
        print(f"refract {command}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrefract: interrupted", file=sys.stderr)
        return 130


def _main_with_plugins(arguments: list[str]) -> int:
    """Load the plugins of the options, then run a command of these plugins, or list the commands."""
    entries: list[str] = []
    while arguments and arguments[0].partition("=")[0] == "--plugin":
        _, equals, value = arguments.pop(0).partition("=")
        if not equals and not arguments:
            print("refract --plugin: expected the path of a Python file, and then a command", file=sys.stderr)
            return 2
        entries.append(value if equals else arguments.pop(0))
    name = arguments[0] if arguments else ""
    _set_environment(name)
    try:
        load(entries)
        if name in _plugin_commands:
            return _with_output_options(name, arguments[1:])
    except RefractError as err:
        print(f"refract {name}: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("\nrefract: interrupted", file=sys.stderr)
        return 130
    if name in COMMANDS:
        place = f"`refract {name} --plugin FILE …`, or the key plugins of its config"
        print(f"refract --plugin: {name} is not a command of these plugins; use {place}", file=sys.stderr)
        return 2
    return _main(arguments)


def _set_environment(command: str) -> None:
    """Set the environment variables of libraries that a command may import."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if command not in ("serve", "torchrun"):  # a server has shorter waits; torchrun starts other commands
        # The default waits minutes for an unreachable server.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        prepare_to_compute()
    hide_credentials()


def prepare_to_compute() -> None:
    """Configure OpenMP and the memory allocator before PyTorch is imported. The server has separate settings."""
    from refract.cores import limit_threads
    from refract.models.allocator import keep_freed_memory
    from refract.models.openmp import let_waiting_threads_sleep

    limit_threads()
    let_waiting_threads_sleep()
    keep_freed_memory()


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: refract COMMAND …", "", "Train, evaluate, serve and retrain image and text classifiers."]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:<{width}}  {line}" for name, (_, line) in commands.items())]
    if _plugin_commands:
        lines += ["", "Plugins:", *(f"  {name:<{width}}  {_summary(run)}" for name, run in _plugin_commands.items())]
    return "\n".join([*lines, "", LAST_LINE])


def _summary(run: Callable[[list[str]], int]) -> str:
    """Return the first line of the docstring of a plugin's command."""
    return (run.__doc__ or "").strip().partition("\n")[0]
