"""How well each distance tells images of the training data's kind from other images, by AUROC.

The network is tf_efficientnet_lite0 with ImageNet weights; the classes are fitted by logistic regression on its features. Known images are
held-out images of the training classes. Far images are handwritten digits, noise and other photos. Near images are those of the last two
classes of each folder with more than two classes, which training excludes.
Peer: pytorch-ood on the same features, `pip install --target FOLDER --no-deps pytorch-ood` with `PYTHONPATH=FOLDER`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from benchmarks.pretrained import NAME, lite0_weights
from benchmarks.report import environment, write
from refract.augment import Preprocess
from refract.models.classifier import Classifier
from refract.models.familiarity import Familiarity
from refract.models.folding import WIDEST
from refract.models.registry import build
from refract.models.training_features import TrainingFeatures
from refract.pipeline.inference.scoring import SampleInput, Scored, score_outputs

OUT = Path(__file__).parents[1] / "results" / "features_familiarity.json"
SIZE, HELD_OUT, SEED = 224, 2, 0
Distances = Callable[[np.ndarray], np.ndarray]
"""(N, D) features → (N,) distances from the training data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders train/CLASS and val/CLASS or test/CLASS"
    )
    parser.add_argument("--photos", type=Path, required=True, help="a folder of other photos")
    parser.add_argument("--train", type=int, default=1000, help="most training images")
    parser.add_argument("--others", type=int, default=200, help="most images of each other set")
    parser.add_argument("--out", type=Path, default=OUT)


def run(args: argparse.Namespace) -> None:
    classifier = _classifier()
    embed = _embedder(classifier)
    report: dict[str, Any] = {"network": NAME, "cost": cost(classifier), "auroc": {}}
    far = {name: embed(files) for name, files in _far(args.photos, args.others).items()}
    for folder in args.data:
        report["auroc"][folder.name] = _measure(folder, far, embed, args)
    write(args.out, report | environment("torch", "timm", "scikit-learn", "pytorch-ood"))


def _measure(
    folder: Path, far: Mapping[str, np.ndarray], embed: Callable[[Any], np.ndarray], args: Any
) -> dict[str, Any]:
    classes = sorted(path.name for path in (folder / "train").iterdir())
    known = classes[:-HELD_OUT] if len(classes) > HELD_OUT else classes
    held = next(folder / name for name in ("val", "test") if (folder / name).is_dir())
    train, labels = _drawn(folder / "train", known, args.train)
    features, same = embed(train), embed(_drawn(held, known, args.others)[0])
    sets = dict(far) | ({"near": embed(_drawn(held, classes[-HELD_OUT:], args.others)[0])} if known != classes else {})
    rows = {}
    for name, distances in _methods(features, np.array(labels)).items():
        of_same = distances(same)
        rows[name] = {other: round(_auroc(of_same, distances(of_other)), 4) for other, of_other in sets.items()}
        print(f"{folder.name} {name}: {rows[name]}", flush=True)
    return {"images": {"train": len(features), "known": len(same)}, "methods": rows}


def _auroc(same: np.ndarray, other: np.ndarray) -> float:
    return float(roc_auc_score(np.r_[np.zeros(len(same)), np.ones(len(other))], np.r_[same, other]))


def _neighbours(reference: np.ndarray, prepared: Distances, k: int, rows: np.ndarray) -> np.ndarray:
    return _neighbour(reference, prepared(rows), k)


def _methods(features: np.ndarray, labels: np.ndarray) -> dict[str, Distances]:
    from refract.pipeline.drift.profile import folded

    head = LogisticRegression(C=0.1, max_iter=300).fit(_unit(features), labels)
    half = _unit(folded(features)).astype(np.float16).astype(np.float32)
    methods: dict[str, Distances] = {}
    for k in (1, 5, 10, 50):
        methods[f"{k}-NN"] = partial(_neighbours, _unit(features), _unit, k)
        methods[f"{k}-NN, 512 features in float16"] = partial(_neighbours, half, lambda rows: _unit(folded(rows)), k)
    methods["Mahalanobis"] = _mahalanobis(features, labels)
    methods["Mahalanobis, 512 features"] = _mahalanobis(folded(features), labels, folded)
    methods["energy"] = lambda rows: -np.logaddexp.reduce(_logits(head, rows), axis=1)
    return methods | _peers(features, labels, head)


def _peers(features: np.ndarray, labels: np.ndarray, head: LogisticRegression) -> dict[str, Distances]:
    try:
        from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis
    except ImportError:
        print("pytorch-ood is not installed: its rows are missing")
        return {}
    import torch

    names = {label: number for number, label in enumerate(sorted(set(labels)))}
    z, y = torch.from_numpy(features), torch.tensor([names[label] for label in labels])
    nearest, gaussian = KNN(None, k=min(50, len(z))).fit_features(z, y), Mahalanobis(None).fit_features(z, y)
    return {
        "pytorch-ood KNN": lambda rows: nearest.predict_features(torch.from_numpy(rows)).numpy(),
        "pytorch-ood Mahalanobis": lambda rows: gaussian.predict_features(torch.from_numpy(rows)).numpy(),
        "pytorch-ood EnergyBased": lambda rows: EnergyBased.score(torch.from_numpy(_logits(head, rows))).numpy(),
    }


def _logits(head: LogisticRegression, rows: np.ndarray) -> np.ndarray:
    values = np.asarray(head.decision_function(_unit(rows)))
    return values if values.ndim == 2 else np.stack([-values / 2, values / 2], axis=1)


def _neighbour(train: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    return 1 - np.partition(rows @ train.T, len(train) - k, axis=1)[:, len(train) - k]


def _mahalanobis(
    train: np.ndarray, labels: np.ndarray, change: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
) -> Distances:
    """Distance to the nearest class mean, with one covariance of all classes, shrunk as Ledoit and Wolf do."""
    from sklearn.covariance import LedoitWolf

    means = np.stack([train[labels == label].mean(axis=0) for label in sorted(set(labels))])
    centred = train - means[np.searchsorted(sorted(set(labels)), labels)]
    precision = LedoitWolf(assume_centered=True).fit(centred).precision_

    def distances(rows: np.ndarray) -> np.ndarray:
        gaps = change(rows)[:, None] - means
        return np.einsum("ncd,de,nce->nc", gaps, precision, gaps, optimize=True).min(axis=1)

    return distances


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def cost(classifier: Classifier, rounds: int = 30) -> dict[str, float]:
    """Return the processor time for one image, in milliseconds: the forward pass, and its familiarity with 2,000 training images."""
    import torch

    rows = np.random.default_rng(SEED).normal(size=(2000, WIDEST)).astype(np.float16)
    empty = ((),) * 2000, np.zeros((2000, 32), np.uint8), ("",) * 2000, (b"",) * 2000
    familiarity = Familiarity(
        TrainingFeatures(1280, rows, *empty, np.linspace(0, 1, 1000, dtype=np.float32)), torch.device("cpu")
    )
    image, embedding = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), torch.ones(1, 1280)
    times: dict[str, list[float]] = {"forward_ms": [], "familiarity_ms": []}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, compute, given in (("forward_ms", classifier, image), ("familiarity_ms", familiarity, embedding)):
                start = time.thread_time()
                compute(given)
                times[name].append(1000 * (time.thread_time() - start))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def _classifier() -> Classifier:
    with tempfile.TemporaryDirectory() as folder:
        network = build(NAME, 2, image_size=(SIZE, SIZE), weights=str(lite0_weights(Path(folder, "lite0.safetensors"))))
    return Classifier(network, mean=(0.5,) * 3, std=(0.5,) * 3).eval()


def _embedder(classifier: Classifier) -> Callable[[list[bytes]], np.ndarray]:
    preprocess = Preprocess(height=SIZE, width=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)

    def embed(files: list[bytes]) -> np.ndarray:
        samples = [SampleInput(partial(bytes, data)) for data in files]
        rows = score_outputs(classifier, preprocess, samples, embed=True, task="multiclass", batch_size=16, threads=1)
        return np.stack([row.embedding for row in rows if isinstance(row, Scored) and row.embedding is not None])

    return embed


def _far(photos: Path, most: int) -> dict[str, list[bytes]]:
    digits = load_digits().images[:most].astype(np.uint8) * 16
    noise = np.random.default_rng(SEED).integers(0, 256, (min(most, 50), SIZE, SIZE, 3), dtype=np.uint8)
    files = [
        path.read_bytes() for path in sorted(photos.rglob("*")) if path.suffix.lower() in (".jpeg", ".jpg", ".png")
    ]
    return {"digits": list(_png(digits)), "noise": list(_png(noise)), "photos": files[:most]}


def _png(images: np.ndarray) -> Iterator[bytes]:
    for image in images:
        yield bytes(cv2.imencode(".png", cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC))[1])


def _drawn(folder: Path, classes: list[str], most: int) -> tuple[list[bytes], list[str]]:
    paths = [path for name in classes for path in sorted((folder / name).iterdir())]
    order = np.random.default_rng(SEED).permutation(len(paths))[:most]
    return [paths[i].read_bytes() for i in order], [paths[i].parent.name for i in order]
