"""Run a command: log to the terminal, and print a user's mistake as one line instead of a traceback."""

import argparse
import errno
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from refract import output
from refract.errors import RefractError
from refract.models.credentials import masked
from refract.pipeline.stopping import ASKED_TO_STOP, Stopped
from refract.plugins import load

log = logging.getLogger(__name__)


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --plugin, whose values `run` loads."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="load this plugin, a Python file or module (docs/plugins.md); may be repeated",
    )


def add_embedding_model_options(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add the options that name the model of embeddings. default: the model without --model, for the help; None requires --model."""
    unless = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--model",
        required=default is None,
        metavar="MODEL",
        help=f"a bundle, a run, or the name of a network such as timm/tf_efficientnet_lite0{unless}",
    )
    parser.add_argument(
        "--weights",
        default="none",
        metavar="WEIGHTS",
        help="weights of a named network, as model.weights of a config: default or a file",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of a named network's input (default: that of its weights)",
    )


def run(command: str, work: Callable[[], int], *, plugins: Sequence[str] = (), resume: str = "") -> int:
    """Load the plugins, run `work` and return its exit code; print an error as one line.

    The code is 2 for invalid input, 1 for a failed service, 75 after SIGTERM and 130 after Ctrl-C. After a signal the line says what
    resumes the work: `resume`, such as "the same command resumes", or for a training run its command.
    """
    logging.basicConfig(level=logging.WARNING, format=output.log_format("%(message)s"), stream=sys.stderr)
    for package in ("augment", "models", "pipeline", "progress"):
        logging.getLogger(f"refract.{package}").setLevel(output.level())
    try:
        load(plugins)
        return _of_rank(work())
    except Stopped as stopped:
        return _of_rank(_stopped(command, stopped, resume))
    except RefractError as error:
        return _failed(command, error, error.exit_code)
    except BrokenPipeError:  # `refract predict … | head`: `refract.cli` exits without a message
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0, "")
        return _failed(command, f"{where}{error.strerror or error}{remedy}", 1)
    except Exception as error:
        if _in_torchrun():
            from refract.pipeline.training.rank_failure import store_error

            store_error(f"{type(error).__name__}: {error}")
        raise


def _in_torchrun() -> bool:
    """Whether torchrun started this process. Imports nothing, unlike `refract.pipeline.training.ranks`."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _of_rank(code: int) -> int:
    """Return the exit code for torchrun, if it started this process."""
    if not _in_torchrun():
        return code
    from refract.pipeline.training.rank_failure import code_of_rank

    return code_of_rank(code)


_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; change the permissions, or name another path"),
    errno.EEXIST: "; a file has the name of a folder that is needed: name another path",
    errno.ENOSPC: "; the disk is full: free space, or name a path on another disk",
}
"""Error number → what to do, for the errors of the file system whose text names no cure."""


def _stopped(command: str, error: Stopped, resume: str) -> int:
    if error.run is not None and not resume and command != "retrain":
        resume = f"`refract train --resume {shlex.quote(str(error.run))}` resumes from the checkpoint"
    if resume or error.run is not None:  # else another rank prints it
        print(f"refract {command}: {error}{f'; {resume}' if resume else ''}", file=sys.stderr)
    return ASKED_TO_STOP if error.signal == signal.SIGTERM else 130


def bin_prefix() -> str:
    """Return the path prefix with which a shell finds `refract` and `mlflow`: empty if the environment is active."""
    if shutil.which("refract"):
        return ""
    scripts = Path(sys.executable).parent
    return f"{scripts.relative_to(Path.cwd()) if scripts.is_relative_to(Path.cwd()) else scripts}/"


def _failed(command: str, error: object, code: int) -> int:
    log.debug("the error was raised here:", exc_info=True)
    if _in_torchrun():
        from refract.pipeline.training.rank_failure import launched, store_error

        store_error(error)
        # `refract torchrun` prints the error of the rank that caused the failure.
        if launched() and os.environ["LOCAL_RANK"] == "0":
            return code
    print(masked(f"refract {command}: {error}"), file=sys.stderr)
    return code
