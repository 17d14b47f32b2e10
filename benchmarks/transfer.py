"""Compare transfer learning from ImageNet weights: Refract's defaults in every mode, plain timm, fastai and a logistic regression.

All train EfficientNet-Lite0 on the same images for the same epochs, select on the same validation set, and are measured on the same test
set. Each training is a separate process, whose processor time is measured. DATA has train|val/CLASS/… (val is the test set) or CLASS/…
(the test set is three tenths, drawn at random). fastai runs if it can be imported, also from a separate folder on PYTHONPATH.

    python -m benchmarks.transfer --data DATA --json benchmarks/results/transfer.json
    python -m benchmarks.transfer --data DATA --settings optim.lr=1e-4 optim.lr=3e-4 model.frozen_norms=false     # Refract alone
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.finetuners.task import Task
from benchmarks.pretrained import NAME, lite0_weights
from benchmarks.report import environment, write

MODES = ("feature-extract", "fine-tune", "gradual", "linear-then-fine-tune")
CONTENDERS = {
    "refract": ("through_refract", MODES),
    "timm": ("plain_timm", ("feature-extract", "fine-tune", "linear-then-fine-tune")),
    "fastai": ("fastai_learner", ("feature-extract", "fine-tune", "linear-then-fine-tune")),
    "logistic regression": ("logistic_regression", ("feature-extract",)),
}
"""Module and modes of each. What has no gradual unfreezing is compared by its best other mode."""


@dataclass(frozen=True)
class Outcome:
    contender: str
    mode: str
    seed: int
    accuracy: float
    processor_seconds: float


def write_manifest(data: Path, seed: int, target: Path) -> Path:
    """A CSV of path, label, split: a fifth of the training images chooses the epoch."""
    import pandas as pd
    from sklearn.model_selection import train_test_split

    from refract.pipeline.data.manifest import load_manifest

    manifest = load_manifest(str(data))
    rows = [(sample.path, sample.labels[0], sample.split) for sample in manifest.samples]
    table = pd.DataFrame(rows, columns=["path", "label", "split"])
    table["path"] = [str(Path(path).resolve()) for path in table["path"]]
    table["label"] = [manifest.labels[label] for label in table["label"]]
    if set(table["split"]) == {""}:
        train, test = train_test_split(table, test_size=0.3, stratify=table["label"], random_state=seed)
    else:
        train, test = table[table["split"] == "train"], table[table["split"].isin(["val", "test"])]
    train, val = train_test_split(train, test_size=0.2, stratify=train["label"], random_state=seed)
    parts = {"train": train, "val": val, "test": test}
    pd.concat([part.assign(split=name) for name, part in parts.items()]).to_csv(target, index=False)
    return target


def run(contender: str, task: Task) -> Outcome:
    """Train in a separate process. RuntimeError with the end of the output if it fails."""
    module = CONTENDERS[contender.partition(" with ")[0]][0]
    before = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.finetuners.{module}", task.to_json()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = processor_seconds() - before
    if done.returncode:
        raise RuntimeError(f"{contender} {task.mode} failed:\n{done.stderr[-2000:]}")
    accuracy = json.loads(done.stdout.splitlines()[-1])["accuracy"]
    outcome = Outcome(contender, task.mode, task.seed, round(accuracy, 4), round(seconds, 1))
    print(f"{contender:<22}{task.mode:<24}seed {task.seed}  {accuracy:.3f}  {seconds:6.1f} s", flush=True)
    return outcome


def processor_seconds() -> float:
    """Return the processor seconds of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def summarise(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Return the mean and the standard deviation over the seeds, by mode, the best first."""
    rows = []
    for contender, mode in dict.fromkeys((o.contender, o.mode) for o in outcomes):
        group = [o for o in outcomes if (o.contender, o.mode) == (contender, mode)]
        accuracies = [o.accuracy for o in group]
        rows.append(
            {
                "contender": contender,
                "mode": mode,
                "accuracy": round(mean(accuracies), 4),
                "deviation": round(stdev(accuracies), 4) if len(group) > 1 else None,
                "processor_seconds": round(mean(o.processor_seconds for o in group), 1),
                "seeds": len(group),
            }
        )
    return sorted(rows, key=lambda row: (MODES.index(row["mode"]), -row["accuracy"]))


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        print(
            f"{row['mode']:<24}{row['contender']:<22}{row['accuracy']:.3f}{spread}  {row['processor_seconds']:6.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="of the network's input, pixels")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument(
        "--settings", nargs="+", default=[], help="KEY=VALUE of the config; each is tried with Refract alone"
    )
    args = parser.parse_args()
    contenders = ["refract"] if args.settings else args.contenders
    if "fastai" in contenders and importlib.util.find_spec("fastai") is None:
        print("fastai is not installed and is skipped")
        contenders = [name for name in contenders if name != "fastai"]
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        weights = lite0_weights(Path(folder) / "lite0.safetensors")
        for seed in range(args.seeds):
            manifest = write_manifest(args.data, seed, Path(folder) / f"{seed}.csv")
            task = Task(
                str(manifest), str(weights), NAME.removeprefix("timm/"), "", seed, epochs=args.epochs, size=args.size
            )
            for mode in args.modes:
                for contender in (name for name in contenders if mode in CONTENDERS[name][1]):
                    if not args.settings:
                        outcomes.append(run(contender, replace(task, mode=mode)))
                    for setting in args.settings:
                        task_with_setting = replace(task, mode=mode, settings=(setting,))
                        outcomes.append(run(f"{contender} with {setting}", task_with_setting))
            if args.json is not None:  # after each seed, so that what an interruption leaves can be read
                setting = {"epochs": args.epochs, "size": args.size, "network": NAME, "data": args.data.name}
                packages = environment("refract", "torch", "timm", "lightning", "fastai", "scikit-learn")
                results = {"rows": summarise(outcomes), "runs": [vars(outcome) for outcome in outcomes]}
                write(args.json, {**setting, **results, "environment": packages})
    show(summarise(outcomes))


if __name__ == "__main__":
    main()
