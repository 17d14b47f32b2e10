"""`refract tune CONFIG SPACE`"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from refract import output
from refract.pipeline import console

EPILOG = """
SPACE.yaml maps dotted config keys to the values to try; a number in a key is a list index:

  optim.lr: {low: 1e-4, high: 1e-1, log: true}
  optim.name: [adamw, sgd]
  optim.momentum: {low: 0.8, high: 0.99, when: {optim.name: sgd}}
  augment.policy.0.RandAugment.magnitude: {low: 1, high: 10, whole: true}
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract tune", usage="%(prog)s CONFIG SPACE [options] [--section.key value …]",
        description="Search a space of configs for the best validation score. The storage has all trials: repeat the command to resume "
        "after a crash; several processes or machines that use one storage share one search.",
        epilog=EPILOG, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", type=Path, help="config that all trials start from")
    parser.add_argument("space", type=Path, help="YAML file with the values to try, as shown below")
    parser.add_argument(
        "--trials", type=int, default=50, help="number of trials, including other processes and earlier runs (50)"
    )
    parser.add_argument("--minutes", type=float, help="start no trial after this time, in minutes (default: no limit)")
    parser.add_argument(
        "--sampler", default="tpe", choices=("tpe", "random", "grid", "coarse-to-fine"),
        help="default tpe; coarse-to-fine draws half of the trials at random, the others within the range of the best",
    )  # fmt: skip
    parser.add_argument(
        "--storage",
        help="Optuna storage: sqlite:///FILE, another database, or journal:FILE (default: study.db in the search's folder)",
    )
    parser.add_argument("--name", help="name of the search (default: the config's file name)")
    parser.add_argument("--workers", type=int, default=1, help="number of processes on this machine")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampler (default 0)")
    args, overrides = parser.parse_known_args(argv)
    if args.trials < 1 or args.workers < 1:
        parser.error(f"--trials {args.trials}, --workers {args.workers}: expected at least 1 of each")
    return console.run("tune", lambda: _tune(args, overrides, argv), resume="the same command resumes")


def _tune(args: argparse.Namespace, overrides: list[str], argv: list[str]) -> int:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.tracking.address import sqlite_uri
    from refract.pipeline.tuning.report import write_report
    from refract.pipeline.tuning.space import read_space
    from refract.pipeline.tuning.study import Search, best_config, open_study, run_trials

    config, space = load_config(args.config, overrides), read_space(args.space)
    name = args.name or args.config.stem
    folder = Path(config.trainer.runs_dir) / f"tune-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    storage = args.storage or sqlite_uri(folder.resolve() / "study.db")
    search = Search(name, args.sampler, args.trials, args.minutes, storage, args.seed)
    study = open_study(search, space, config, folder)
    trial_count = len(study.trials)
    if trial_count:
        print(f"resuming {name}: {trial_count} trials so far", file=sys.stderr)
    # This process has created the storage, which the others join.
    command = [sys.executable, "-m", "refract", "tune", *argv, "--workers", "1", "--seed"]
    others = [
        subprocess.Popen([*command, str(args.seed + 1000 * k)], stdout=subprocess.DEVNULL)
        for k in range(1, args.workers)
    ]
    try:
        run_trials(study, search, space, config, folder)
    except BaseException:
        for process in others:
            process.terminate()
        for process in others:
            process.wait()
        raise
    codes = [process.wait() for process in others]
    if any(codes):
        return 1
    best = best_config(study, config)
    written = write_report(study, best, folder)
    print(f"best: trial {study.best_trial.number}, {study.best_value:.4f} on validation")
    for key, value in study.best_trial.user_attrs["drawn"].items():
        print(f"  {key}: {value}")
    print("wrote " + ", ".join(map(str, written)))
    drawn = study.best_trial.user_attrs["drawn"]
    output.result({"trial": study.best_trial.number, "score": study.best_value, "drawn": drawn, "files": list(written)})
    if output.is_quiet():
        return 0
    print(f"next: {console.bin_prefix()}refract train {shlex.quote(str(folder / 'best.yaml'))}")
    return 0
