"""Start the ranks of a training by torchrun's own launcher, and report their failure in one sentence."""

import argparse
import logging
import os
import shlex
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refract import output
from refract.cores import cores
from refract.errors import InputError, ServiceError
from refract.pipeline.config.config import ConfigError
from refract.pipeline.stopping import ASKED_TO_STOP
from refract.pipeline.training.rank_failure import CODES

log = logging.getLogger(__name__)

COMMANDS = ("train",)
"""The commands that several ranks can run together."""

SHUTDOWN_S = 120
"""Seconds that ranks have after SIGTERM or Ctrl-C to finish their step and write a checkpoint, unless --shutdown-timeout says otherwise."""

INVALID_INPUT = InputError.exit_code
"""The exit code of a rank whose config or data are invalid."""


class JobFailed(ServiceError):
    """A rank failed. code: the exit code of the job; the message names the rank, its machine, its log and the next command."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # of this error, in place of that of its class


def launch(argv: Sequence[str]) -> int:
    """Run `argv`, torchrun's options and then a command of Refract, in as many processes as the options say. Returns the exit code.

    Raises JobFailed if a rank failed after the last restart, ConfigError for options that do not fit. SystemExit of torchrun's parser.
    """
    with _quiet_connections():
        from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    args = torchrun.parse_args(list(argv))
    if args.training_script not in COMMANDS or args.module or args.no_python or args.run_path:
        raise ConfigError(
            f"the command {args.training_script!r} cannot run on several ranks; "
            f"after torchrun's options, name one of: {', '.join(COMMANDS)} (without -m, --no-python and --run-path)"
        )
    command = [args.training_script, *args.training_script_args]
    temporary = args.log_dir is None
    ranks = _ranks(torchrun, args)
    _complete(args, ranks)
    _quiet_torchrun()
    codes = Path(tempfile.mkdtemp(prefix="refract-codes-"))
    os.environ[CODES] = str(codes)
    args.training_script, args.training_script_args, args.module = "refract", command, True
    try:
        with _restarts_without_invalid_input():
            torchrun.run(args)
        if temporary:
            shutil.rmtree(args.log_dir, ignore_errors=True)
        return max((int(file.read_text()) for file in codes.glob("*.code")), default=0)
    except ChildFailedError as error:
        raise _job_failed(error, Path(args.log_dir), _again(argv, command)) from error
    except RendezvousClosedError as error:
        raise JobFailed("another machine ended the job; the output of its launcher names the cause", 1) from error
    except RendezvousError as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        place = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
        raise JobFailed(
            f"this machine did not meet the others at {place} ({cause}); start the same command on all "
            "machines, with --rdzv-endpoint of the first one and the same --nnodes and --rdzv-id",
            1,
        ) from error
    except SignalException as stop:
        return {signal.SIGTERM: ASKED_TO_STOP, signal.SIGINT: 130}.get(stop.sigval, 128 + stop.sigval)
    finally:
        shutil.rmtree(codes, ignore_errors=True)


def _ranks(torchrun: Any, args: argparse.Namespace) -> int:
    """Return the number of ranks on this machine. ConfigError for numbers of ranks or machines that cannot be started."""
    try:
        ranks = torchrun.determine_local_world_size(args.nproc_per_node)
    except ValueError as error:
        raise ConfigError(
            f"--nproc-per-node: {args.nproc_per_node}: {error}; write a number of 1 or more, or gpu for one rank on each GPU"
        ) from error
    if ranks < 1:
        raise ConfigError(f"--nproc-per-node: {args.nproc_per_node} is not a number of 1 or more")
    try:
        fewest, most = torchrun.parse_min_max_nnodes(args.nnodes)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--nnodes: {args.nnodes} is neither a number of machines nor MIN:MAX") from error
    if not 1 <= fewest <= most:
        raise ConfigError(f"--nnodes: {args.nnodes} is not a number of 1 or more, nor MIN:MAX with 1 ≤ MIN ≤ MAX")
    return ranks


@contextmanager
def _restarts_without_invalid_input() -> Iterator[None]:
    """Replace torchrun's agent by one that does not restart the ranks for invalid input. torchrun has no option for that."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode == INVALID_INPUT for failure in result.failures.values()):
                self._remaining_restarts = 0
            elif result.failures and self._remaining_restarts:
                rank, failure = _first(result.failures)
                left = self._remaining_restarts - 1
                log.warning("rank %d %s; all ranks start again (restarts left: %d)", rank, _what(failure), left)
            return result

    original, api.LocalElasticAgent = api.LocalElasticAgent, Agent  # type: ignore[misc]  # the name that torchrun reads
    try:
        yield
    finally:
        api.LocalElasticAgent = original  # type: ignore[misc]  # as above


@contextmanager
def _quiet_connections() -> Iterator[None]:
    """Import PyTorch without its messages about connections, which `JobFailed` replaces. The ranks and --verbose show them."""
    name = "TORCH_CPP_LOG_LEVEL"
    quiet = name not in os.environ and output.level() > logging.DEBUG
    if quiet:
        os.environ[name] = "FATAL"
    try:
        yield
    finally:
        if quiet:
            del os.environ[name]


def _is_here(endpoint: str) -> bool:
    """Whether the host of HOST:PORT is this machine. torchrun compares names, which fails for some addresses of containers."""
    host = endpoint.rpartition(":")[0] or endpoint
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _complete(args: Any, ranks: int) -> None:
    """Set the options that the user omitted: the first rank of this machine prints, the others write logs."""
    if args.log_dir is None:
        args.log_dir = tempfile.mkdtemp(prefix="refract-torchrun-")
    if args.redirects == "0" and args.tee == "0" and ranks > 1:
        args.redirects = ",".join(f"{rank}:3" for rank in range(1, ranks))
    if args.rdzv_backend == "c10d" and "is_host" not in args.rdzv_conf and _is_here(args.rdzv_endpoint):
        args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, "is_host=true"]))
    if args.shutdown_timeout is None and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        args.shutdown_timeout = SHUTDOWN_S
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))


def _quiet_torchrun() -> None:
    """Silence the log lines of torchrun's launcher about a failure, which `JobFailed` replaces. --verbose shows them."""
    if output.level() > logging.DEBUG:
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _job_failed(error: Any, log_dir: Path, again: str) -> JobFailed:
    """Return the error that names the rank whose failure caused those of the others. error: torchrun's ChildFailedError."""
    rank, failure = _first(error.failures)
    file = _log_of(log_dir, failure.local_rank)
    where = f"rank {rank} on {socket.gethostname()}{'' if file is None else f' (log: {file})'}"
    code = failure.exitcode if failure.exitcode > 0 else 1
    remedy = "" if code == INVALID_INPUT else f"; `{again}` resumes from the last checkpoint, if one was written"
    return JobFailed(f"{where} {_what(failure)}{remedy}", code)


def _first(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Return the rank, and torchrun's record, of the failure that caused those of the others."""
    return min(failures.items(), key=lambda item: (_is_consequence(item[1]), item[1].timestamp))


def _what(failure: Any) -> str:
    """Return how a rank failed, in words."""
    message = failure.message["message"] if isinstance(failure.message, dict) else None
    if failure.exitcode >= 0:
        return f"failed: {message}" if message else f"failed with exit code {failure.exitcode}"
    short = ", which the kernel sends if memory is short" if failure.exitcode == -signal.SIGKILL else ""
    return f"was ended by {failure.signal_name()}{short}"


def _is_consequence(failure: Any) -> bool:
    """Whether a rank failed because another one did: torchrun ended it, or it lost a connection."""
    elsewhere = isinstance(failure.message, dict) and failure.message.get("elsewhere", False)
    return elsewhere or failure.exitcode == -signal.SIGTERM


def _log_of(log_dir: Path, local_rank: int) -> Path | None:
    """Return the newest log of a rank, None if its output went to the terminal."""
    logs = list(log_dir.glob(f"*/attempt_*/{local_rank}/stderr.log"))
    return max(logs, key=lambda path: path.stat().st_mtime) if logs else None


def _again(argv: Sequence[str], command: Sequence[str]) -> str:
    """Return the command that resumes the job."""
    resumes = [] if any(word.partition("=")[0] == "--resume" for word in command) else ["--resume", "auto"]
    return shlex.join(["refract", "torchrun", *argv, *resumes])
