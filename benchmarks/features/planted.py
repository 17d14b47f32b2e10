"""What of planted near-duplicates and wrong labels is found, by embeddings and by the methods that need none.

The network is tf_efficientnet_lite0 with ImageNet weights; embeddings are computed once and kept in --store.
Near-duplicates: copies of --planted training images, changed in six ways, join the held-out images. The hash is that of the data check.
The other pairs that a method reports are listed: the held-out images as they are may resemble training images too.
Labels: NOISE of all labels are replaced by another class. A fifth of the images is the test set, a tenth for validation. A single run knows
its predictions on the test set, and those on its own training images. `cross-validated` joins out-of-fold predictions to the test set's.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from benchmarks.pretrained import NAME, lite0_weights
from benchmarks.report import environment, write
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.near_duplicates import near_pairs
from refract.pipeline.data.scan import scan
from refract.pipeline.evaluation.assess import calibrated_probabilities
from refract.pipeline.evaluation.label_errors import likely_label_errors
from refract.pipeline.features.embed import Options, embed, source_name
from refract.pipeline.features.heads import MODES, Part, fit_head, outputs
from refract.pipeline.features.model import EmbeddingModel, open_model
from refract.pipeline.features.near_duplicates import similar_pairs
from refract.pipeline.features.out_of_fold import predict_out_of_fold
from refract.pipeline.features.source import samples_of
from refract.pipeline.features.store import FeatureStore
from refract.pipeline.stopping import Stop

OUT = Path(__file__).parents[1] / "results" / "features_planted.json"
NOISE, QUALITY = 0.1, 90
FRACTIONS = (0.05, 0.1)
"""Of all images: how much of a list a person reviews."""


def _rotated(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), draw.uniform(4, 8) * draw.choice([-1, 1]), 1)
    return cv2.warpAffine(pixels, turn, (width, height), borderMode=cv2.BORDER_REFLECT_101)


def _cropped(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    height, width = (round(0.85 * side) for side in pixels.shape[:2])
    top, left = draw.integers(0, pixels.shape[0] - height + 1), draw.integers(0, pixels.shape[1] - width + 1)
    return pixels[top : top + height, left : left + width]


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "JPEG quality 40": lambda pixels, _: pixels,
    "resized to 70 %": lambda pixels, _: cv2.resize(pixels, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA),
    "brightness": lambda pixels, _: cv2.convertScaleAbs(pixels, alpha=1.25, beta=15),
    "crop of 85 %": _cropped,
    "rotation of 4 to 8 degrees": _rotated,
    "horizontal flip": lambda pixels, _: pixels[:, ::-1],
}


class Embedded(NamedTuple):
    """samples: with labels; vectors: float32 (N, D)."""

    samples: list[Sample]
    vectors: np.ndarray
    labels: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True,
        help="folders train/CLASS and val/CLASS or test/CLASS; of folders CLASS, a fifth is held out",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=224, help="of the network's input, pixels")
    parser.add_argument("--planted", type=int, default=30, help="near-duplicates of each kind")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the wrong labels")
    parser.add_argument("--store", type=Path, default=Path("features"))
    parser.add_argument("--out", type=Path, default=OUT)


def run(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {"network": NAME, "size": args.size, "noise": NOISE, "folders": {}}
    with tempfile.TemporaryDirectory() as name:
        model = open_model(NAME, str(lite0_weights(Path(name) / "lite0.safetensors")), args.size)
        for folder in args.data:
            data = _embedded(str(folder), model, args)
            report["folders"][folder.name] = {
                "near_duplicates": _near_duplicates(data, model, Path(name) / folder.name, args),
                "label_errors": list(_label_errors(data, args.seeds)),
            }
            write(args.out, report | {"environment": environment("refract", "torch", "timm", "opencv-python-headless")})


def _embedded(source: str, model: EmbeddingModel, args: argparse.Namespace) -> Embedded:
    samples, names = samples_of(source)
    store = FeatureStore(args.store, model.key, model.record)
    done = embed(model, samples, names, store, source_name(source), Options(), Stop("now"))
    keys = [key for key in done.keys if key is not None]
    assert len(keys) == len(samples), done.failed
    return Embedded(samples, store.vectors(keys), tuple(sorted({label for row in names for label in row})))


def _near_duplicates(data: Embedded, model: EmbeddingModel, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    is_train = np.array([sample.split == "train" for sample in data.samples])
    if not is_train.any():
        is_train = np.random.default_rng(0).permutation(len(is_train)) >= len(is_train) // 5
    train = [data.samples[row] for row in np.flatnonzero(is_train)]
    source_of = _plant(train, folder, args.planted)
    planted = _embedded(str(folder), model, args)
    measured = [data.samples[row] for row in np.flatnonzero(~is_train)] + planted.samples
    vectors = np.concatenate([data.vectors[~is_train], planted.vectors])
    pairs = similar_pairs(measured, vectors, train, data.vectors[is_train], torch.device("cpu"))
    by_features = {(measured[i].path, train[j].path) for i, j in pairs}
    split = [
        Sample(sample.path, (0,), part) for part, rows in (("train", train), ("test", measured)) for sample in rows
    ]
    by_hash = {*near_pairs(Manifest("", tuple(split), ("a",), "multiclass"), scan(split).difference_hashes)}
    pairs_by_method = {"hash": by_hash, "embeddings": by_features, "both": by_hash | by_features}
    rows = {}
    for method, method_pairs in pairs_by_method.items():
        counts: defaultdict[str, int] = defaultdict(int)
        for path, other in method_pairs:
            counts[Path(path).parent.name] += source_of.get(path) == other
        others = sorted(pair for pair in method_pairs if source_of.get(pair[0]) != pair[1])
        recall = {kind: round(counts[kind] / args.planted, 3) for kind in CHANGES}
        rows[method] = {
            "recall": recall, "mean_recall": round(mean(recall.values()), 3), "other_pairs": len(others),
            "examples": [[Path(path).name, Path(other).name] for path, other in others[:20]],
        }  # fmt: skip
        print(f"{folder.name} {method}: {rows[method]}", flush=True)
    return {"training_images": len(train), "held_out_images": int((~is_train).sum()), "methods": rows}


def _plant(train: Sequence[Sample], folder: Path, count: int) -> dict[str, str]:
    """Write the changed copies as `folder`/KIND/…; return the path of each → the path of its source."""
    draw, source_of = np.random.default_rng(0), {}
    for row in draw.choice(len(train), count, replace=False):
        pixels = cv2.imread(train[row].path)
        assert pixels is not None
        for kind, change in CHANGES.items():
            target = folder / kind / f"{row}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            quality = 40 if kind == "JPEG quality 40" else QUALITY
            cv2.imwrite(str(target), change(pixels, draw), [cv2.IMWRITE_JPEG_QUALITY, quality])
            source_of[str(target)] = train[row].path
    return source_of


def _label_errors(data: Embedded, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the precision and recall of each method's list, and of the first FRACTIONS of its ranking, the mean over the seeds."""
    scores_by_method: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for seed in range(seeds):
        for mode in MODES:
            truth, given = _with_wrong_labels(data, seed)
            for method, (rows, predicted) in _methods(mode, data, given, seed).items():
                scores_by_method[mode, method].append(_scores(rows, predicted, given, truth))
    for (mode, method), scores in scores_by_method.items():
        # A list without an entry has no precision.
        values = {name: [score[name] for score in scores if score[name] is not None] for name in scores[0]}
        row = {name: round(mean(numbers), 3) if numbers else None for name, numbers in values.items()}
        print(f"{mode} {method}: {row}", flush=True)
        yield {"mode": mode, "method": method, "seeds": seeds, **row}


def _with_wrong_labels(data: Embedded, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (true labels, labels with NOISE of wrong ones)."""
    draw = np.random.default_rng(seed)
    truth = np.array([sample.labels[0] for sample in data.samples])
    given = truth.copy()
    wrong = draw.choice(len(truth), round(NOISE * len(truth)), replace=False)
    given[wrong] = (given[wrong] + draw.integers(1, len(data.labels), len(wrong))) % len(data.labels)
    return truth, given


def _methods(mode: str, data: Embedded, given: np.ndarray, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return method → (rows of the samples, their probabilities)."""
    order = np.random.default_rng(seed).permutation(len(given))
    val, test, train = np.split(order, [len(order) // 10, 3 * len(order) // 10])
    known = np.concatenate([train, val])
    part = Part(data.vectors, np.eye(len(data.labels), dtype=bool)[given])
    fitted = fit_head(mode, Part(*(values[train] for values in part)), Part(*(values[val] for values in part)),
                      multilabel=False)  # fmt: skip
    logits = outputs(fitted.head, data.vectors).numpy()
    on_test = calibrated_probabilities(logits[test], given[test], "multiclass")
    samples = [Sample(str(row), (int(given[row]),)) for row in known]
    held_out = predict_out_of_fold(
        mode, fitted.choice, Part(*(values[known] for values in part)), samples, [sample.path for sample in samples],
        multilabel=False, balanced=False, seed=seed,
    )  # fmt: skip
    checked = np.array([int(sample.path) for sample in held_out.samples])
    crossed = calibrated_probabilities(held_out.logits, given[checked], "multiclass")
    return {
        "test set of a single run": (test, on_test),
        "a single run on all images": (np.arange(len(given)), calibrated_probabilities(logits, given, "multiclass")),
        "cross-validated": (np.concatenate([checked, test]), np.concatenate([crossed, on_test])),
    }


def _scores(rows: np.ndarray, predicted: np.ndarray, given: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    wrong = given != truth
    listed = rows[likely_label_errors(predicted, given[rows])]
    given_probability = predicted[np.arange(len(rows)), given[rows]]
    others = predicted.copy()
    others[np.arange(len(rows)), given[rows]] = -1
    ranked = rows[np.argsort(given_probability - others.max(axis=1), kind="stable")]
    scores: dict[str, Any] = {
        "listed": float(len(listed)),
        "precision": float(wrong[listed].mean()) if len(listed) else None,
        "recall": float(wrong[listed].sum() / wrong.sum()),
    }
    for fraction in FRACTIONS:
        first = ranked[: round(fraction * len(given))]
        scores |= {
            f"precision_{fraction}": float(wrong[first].mean()),
            f"recall_{fraction}": float(wrong[first].sum() / wrong.sum()),
        }
    return scores
