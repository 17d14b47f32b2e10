"""How accurate heads are that are fitted on 1, 5, 10 and 50 images per class.

The network is tf_efficientnet_lite0 with ImageNet weights. Refract's modes and scikit-learn's logistic regression get the same embeddings,
which are computed once and kept in --store. The images of a seed are drawn from the folder's training images. Four fifths of them, at
least one, fit the head; the rest chooses the regularisation. With --trained, plain timm, fastai and Refract's fine-tuning train on the
same images, each in a separate process, for the number of epochs in EPOCHS. Heads are measured on the folder's other split, trained
networks on at most --test images of it, and `probe_accuracy` is that of Refract's probe on the same draws and test images. With one image
per class, the trained networks choose their epoch on a further image of each class, which the heads do not get.
"""

import argparse
import csv
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from benchmarks.finetuners.task import Task
from benchmarks.pretrained import NAME, lite0_weights
from benchmarks.report import environment, write
from benchmarks.transfer import run as train
from refract.pipeline.features.embed import Options, embed, source_name
from refract.pipeline.features.heads import MODES, Part, fit_head
from refract.pipeline.features.model import open_model
from refract.pipeline.features.source import samples_of
from refract.pipeline.features.store import FeatureStore
from refract.pipeline.stopping import Stop

OUT = Path(__file__).parents[1] / "results" / "features_few_images.json"
TRAINED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "refract": ("refract", "fine-tune", ()),
    "refract, head first": ("refract", "linear-then-fine-tune", ()),
    "timm": ("timm", "fine-tune", ()),
    "timm, fast head": ("timm", "fine-tune", ("optim.head_lr=10",)),
    "timm, fast head, frozen norms": ("timm", "fine-tune", ("optim.head_lr=10", "model.frozen_norms=true")),
    "fastai": ("fastai", "linear-then-fine-tune", ()),
}
"""Name → (contender, its mode, its settings): of fastai its documented `fine_tune`; of timm also with Refract's defaults."""
EPOCHS = ((1, 12), (5, 8), (10, 6), (50, 3))
"""(most images per class, epochs): three epochs of one image per class would be three steps."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Embedded(NamedTuple):
    """A folder's samples: paths, labels (N,), embeddings (N, D), and whether each is a training sample."""

    paths: list[str]
    labels: np.ndarray
    vectors: np.ndarray
    is_train: np.ndarray
    seconds: float


class Drawn(NamedTuple):
    """Row numbers of the samples that fit, choose and measure; further: one of each class, not among the others."""

    fit: np.ndarray
    choose: np.ndarray
    test: np.ndarray
    further: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders train/CLASS and val/CLASS or test/CLASS"
    )
    parser.add_argument("--size", type=int, default=224, help="of the network's input, pixels")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5, 10, 50], help="training images per class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--trained", type=int, default=0, metavar="SEEDS", help="also train timm, fastai and Refract for so many seeds"
    )
    parser.add_argument("--test", type=int, default=150, help="most test images of trained networks")
    parser.add_argument("--store", type=Path, default=Path("features"))
    parser.add_argument("--out", type=Path, default=OUT)


def run(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {"network": NAME, "size": args.size, "folders": {}}
    with tempfile.TemporaryDirectory() as name:
        weights = lite0_weights(Path(name) / "lite0.safetensors")
        for folder in args.data:
            data = _embedded(folder, weights, args)
            rows: list[dict[str, Any]] = []
            report["folders"][folder.name] = {"embedding_seconds": round(data.seconds, 1), "rows": rows}
            for images in args.images:
                rows += _measured(data, images, args, weights, Path(name))
                packages = environment("refract", "torch", "timm", "fastai", "scikit-learn")
                write(args.out, report | {"environment": packages})


def _embedded(folder: Path, weights: Path, args: argparse.Namespace) -> Embedded:
    samples, names = samples_of(str(folder))
    model = open_model(NAME, str(weights), args.size)
    store = FeatureStore(args.store, model.key, model.record)
    started = time.perf_counter()
    done = embed(model, samples, names, store, source_name(str(folder)), Options(), Stop("now"))
    keys = [key for key in done.keys if key is not None]
    assert len(keys) == len(samples), done.failed
    classes = sorted({name for (name,) in names})
    labels = np.array([classes.index(name) for (name,) in names])
    is_train = np.array([sample.split == "train" for sample in samples])
    seconds = time.perf_counter() - started if done.computed else 0.0
    return Embedded([sample.path for sample in samples], labels, store.vectors(keys), is_train, seconds)


def _measured(
    data: Embedded, images: int, args: argparse.Namespace, weights: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield the accuracy over the seeds and the mean processor seconds of a fit, for each contender."""
    outcomes_by_contender: dict[str, list[tuple[float, float]]] = {}
    probe: list[float] = []
    for seed in range(args.seeds):
        drawn = _draw(data, images, seed)
        for name, fitted in FITTED.items():
            started = time.process_time()
            accuracy = fitted(data, drawn)
            outcomes_by_contender.setdefault(name, []).append((accuracy, time.process_time() - started))
        if seed < args.trained:
            drawn = drawn._replace(test=_at_most(drawn.test, args.test))
            probe.append(FITTED["refract probe"](data, drawn))
            manifest = _manifest(data, drawn, folder / f"{images}-{seed}.csv")
            task = Task(
                str(manifest), str(weights), NAME.removeprefix("timm/"), "", seed, size=args.size,
                epochs=next((epochs for most, epochs in EPOCHS if images <= most), EPOCHS[-1][1]),
                batch_size=min(32, len(drawn.fit)),
            )  # fmt: skip
            for name, (contender, mode, settings) in TRAINED.items():
                if contender == "fastai" and not importlib.util.find_spec("fastai"):
                    continue
                outcome = train(contender, replace(task, mode=mode, settings=settings))
                outcomes_by_contender.setdefault(f"{name}, trained", []).append(
                    (outcome.accuracy, outcome.processor_seconds)
                )
    for name, outcomes in outcomes_by_contender.items():
        accuracies = [accuracy for accuracy, _ in outcomes]
        row = {
            "images": images, "contender": name, "accuracy": round(mean(accuracies), 4), "seeds": len(outcomes),
            "deviation": round(stdev(accuracies), 4) if len(accuracies) > 1 else None,
            "processor_seconds": round(mean(seconds for _, seconds in outcomes), 2),
        }  # fmt: skip
        if name not in FITTED:
            row["probe_accuracy"] = round(mean(probe), 4)
        print(
            f"{images:3} {name:22} {row['accuracy']:.3f} ± {row['deviation'] or 0:.3f}  {row['processor_seconds']:6.2f} s",
            flush=True,
        )
        yield row


def _at_most(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if len(rows) <= most else np.random.default_rng(0).permutation(rows)[:most]


def _draw(data: Embedded, images: int, seed: int) -> Drawn:
    draw = np.random.default_rng([seed, images])
    fit: list[int] = []
    choose: list[int] = []
    further: list[int] = []
    for label in range(data.labels.max() + 1):
        all_of_label = draw.permutation(np.flatnonzero(data.is_train & (data.labels == label)))
        label_rows = all_of_label[:images]
        count = max(1, round(0.8 * len(label_rows)))
        fit += label_rows[:count].tolist()
        choose += label_rows[count:].tolist()
        further += all_of_label[images : images + 1].tolist()
    return Drawn(np.array(fit), np.array(choose, int), np.flatnonzero(~data.is_train), np.array(further, int))


def _part(data: Embedded, rows: np.ndarray) -> Part:
    return Part(data.vectors[rows], np.eye(data.labels.max() + 1, dtype=bool)[data.labels[rows]])


def _by_refract(mode: str) -> Callable[[Embedded, Drawn], float]:
    def fitted(data: Embedded, drawn: Drawn) -> float:
        import torch

        head = fit_head(mode, _part(data, drawn.fit), _part(data, drawn.choose), multilabel=False).head
        with torch.inference_mode():
            predicted = head(torch.from_numpy(data.vectors[drawn.test])).argmax(dim=1).numpy()
        return float((predicted == data.labels[drawn.test]).mean())

    return fitted


def _by_scikit_learn(data: Embedded, drawn: Drawn) -> float:
    """As a careful user does it: standardised, the strength chosen on the validation images, or 1 without any."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    strengths = STRENGTHS if len(drawn.choose) else (1.0,)
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(
            data.vectors[drawn.fit], data.labels[drawn.fit]
        )
        for strength in strengths
    ]
    if len(models) > 1:
        models.sort(key=lambda model: -model.score(data.vectors[drawn.choose], data.labels[drawn.choose]))
    return float(models[0].score(data.vectors[drawn.test], data.labels[drawn.test]))


FITTED: dict[str, Callable[[Embedded, Drawn], float]] = {
    **{f"refract {mode}": _by_refract(mode) for mode in MODES},
    "scikit-learn": _by_scikit_learn,
}


def _manifest(data: Embedded, drawn: Drawn, target: Path) -> Path:
    """Write the images as a table."""
    choose = drawn.choose if len(drawn.choose) else drawn.further
    with target.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for split, rows in (("train", drawn.fit), ("val", choose), ("test", drawn.test)):
            table.writerows([str(Path(data.paths[row]).resolve()), f"class {data.labels[row]}", split] for row in rows)
    return target
