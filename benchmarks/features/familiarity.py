"""How well each distance tells images of the training data's kind from other images, by AUROC.

The network is tf_efficientnet_lite0 with ImageNet weights; the classes are fitted by logistic regression on its features. Known images are
held-out images of the training classes. Far images are handwritten digits, noise and other photos. Near images are those of classes that
training excludes: HELD_OUT of each folder with more than two classes, drawn --draws times, and the mean and the lowest AUROC are reported.
"bundle" is what Refract computes from 512 folded features in float16.
Peer: pytorch-ood on the same features, `pip install --target FOLDER --no-deps pytorch-ood` with `PYTHONPATH=FOLDER`.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from benchmarks.pretrained import NAME
from benchmarks.report import environment, write
from refract.models.classifier import Classifier
from refract.models.familiarity import Familiarity
from refract.models.folding import WIDEST
from refract.models.training_features import DISTANCES, TrainingFeatures
from refract.pipeline.data.manifest import Sample
from refract.pipeline.drift.profile import folded
from refract.pipeline.features.embed import Stored
from refract.pipeline.features.model import EmbeddingModel, open_model
from refract.pipeline.features.store import FeatureStore

OUT = Path(__file__).parents[1] / "results" / "features_familiarity.json"
SIZE, SEED = 224, 0
HELD_OUT = 2
"""Excluded classes, one of three."""
Distances = Callable[[np.ndarray], np.ndarray]
"""(N, D) features → (N,) distances from the training data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders train/CLASS and val/CLASS or test/CLASS"
    )
    parser.add_argument(
        "--photos",
        type=Path,
        nargs="+",
        required=True,
        help="folders of other photos; those of --data are far from each other",
    )
    parser.add_argument("--train", type=int, default=1000, help="most training images")
    parser.add_argument("--held", type=int, default=500, help="most held-out images, known and near")
    parser.add_argument("--others", type=int, default=200, help="most images of each far set")
    parser.add_argument("--draws", type=int, default=5, help="draws of the excluded classes")
    parser.add_argument(
        "--store", type=Path, default=Path("features"), help="feature store, which keeps the embeddings"
    )
    parser.add_argument("--out", type=Path, default=OUT)


def run(args: argparse.Namespace) -> None:
    model = open_model(NAME, "default", SIZE)
    embed = _embedder(model, args.store)
    report: dict[str, Any] = {"network": NAME, "cost": cost(model.classifier), "auroc": {}}
    far = {name: embed(files) for name, files in _far(args.photos, args.others).items()}
    for folder in args.data:
        others = {name: rows for name, rows in far.items() if name != folder.name}
        report["auroc"][folder.name] = _measure(folder, others, embed, args)
        write(args.out, report | environment("torch", "timm", "scikit-learn", "pytorch-ood"))


def _measure(
    folder: Path, far: Mapping[str, np.ndarray], embed: Callable[[Sequence[Sample]], np.ndarray], args: Any
) -> dict[str, Any]:
    classes = sorted(path.name for path in (folder / "train").iterdir())
    held = next(folder / name for name in ("val", "test") if (folder / name).is_dir())
    (files, names), (others, other_names) = (
        _drawn(part, classes, most) for part, most in ((folder / "train", args.train), (held, args.held))
    )
    train, test = embed(files), embed(others)
    labels, test_labels = np.array(names), np.array(other_names)
    aurocs_by_method: dict[str, dict[str, list[float]]] = {}
    draw = np.random.default_rng(SEED)
    for _ in range(args.draws if len(classes) > HELD_OUT else 1):
        left = min(HELD_OUT, len(classes) - 2)
        known = np.sort(draw.permutation(classes)[left:])
        of_train, of_test = np.isin(labels, known), np.isin(test_labels, known)
        sets = dict(far) | ({"near": test[~of_test]} if left else {})
        for name, distances in _methods(train[of_train], labels[of_train]).items():
            of_same = distances(test[of_test])
            for other, rows in sets.items():
                aurocs_by_method.setdefault(name, {}).setdefault(other, []).append(_auroc(of_same, distances(rows)))
    methods = {}
    for name, aurocs in aurocs_by_method.items():
        methods[name] = {other: round(float(np.mean(values)), 4) for other, values in aurocs.items()}
        if len(aurocs.get("near", [])) > 1:
            methods[name]["near, lowest"] = round(min(aurocs["near"]), 4)
        print(f"{folder.name} {name}: {methods[name]}", flush=True)
    return {"images": {"train": len(train), "held": len(test)}, "methods": methods}


def _auroc(same: np.ndarray, other: np.ndarray) -> float:
    return float(roc_auc_score(np.r_[np.zeros(len(same)), np.ones(len(other))], np.r_[same, other]))


def _predicted(detector: Any, change: Distances, rows: np.ndarray) -> np.ndarray:
    import torch

    return detector.predict_features(torch.from_numpy(change(rows))).numpy()


def _neighbours(reference: np.ndarray, prepared: Distances, k: int, rows: np.ndarray) -> np.ndarray:
    return _neighbour(reference, prepared(rows), k)


def _methods(features: np.ndarray, labels: np.ndarray) -> dict[str, Distances]:
    head = LogisticRegression(C=10, max_iter=300).fit(_unit(features), labels)
    half = _reduced(features)
    methods: dict[str, Distances] = {}
    for k in (1, 5, 50):
        methods[f"{k}-NN"] = partial(_neighbours, _unit(features), _unit, k)
    for name in DISTANCES:
        methods[f"bundle, {name}"] = _bundled(name, half, labels)
    methods["Mahalanobis"] = _mahalanobis(features, labels)
    methods["Mahalanobis, unit vectors"] = _mahalanobis(_unit(features), labels, _unit)
    methods["relative Mahalanobis, unit vectors"] = _relative(_unit(features), labels)
    methods["ViM, unit vectors"] = _vim(_unit(features), head)
    methods["energy"] = lambda rows: -np.logaddexp.reduce(_logits(head, rows), axis=1)
    methods["largest logit"] = lambda rows: -_logits(head, rows).max(axis=1)
    return methods | _peers(features, labels, head)


def _reduced(rows: np.ndarray) -> np.ndarray:
    return _unit(folded(rows)).astype(np.float16).astype(np.float32)


def _bundled(name: str, half: np.ndarray, labels: np.ndarray) -> Distances:
    import torch

    empty = np.zeros((len(half), 32), np.uint8), ("",) * len(half), (b"",) * len(half), np.zeros(0, np.float32)
    numbers = np.unique(labels, return_inverse=True)[1]
    training = TrainingFeatures(1280, half, tuple((int(number),) for number in numbers), *empty, name)
    familiarity = Familiarity(training, torch.device("cpu"))
    return lambda rows: familiarity.distances(torch.from_numpy(rows)).numpy()


def _relative(train: np.ndarray, labels: np.ndarray) -> Distances:
    """Ren et al. 2021, arXiv:2106.09022: less the distance from the one normal distribution of all training images."""
    by_class, of_all = _mahalanobis(train, labels, _unit), _mahalanobis(train, np.zeros(len(train)), _unit)
    return lambda rows: by_class(rows) - of_all(rows)


def _vim(train: np.ndarray, head: LogisticRegression, dimensions: int = 64) -> Distances:
    """Wang et al. 2022, arXiv:2203.10807: the length outside of the principal directions, scaled to the logits, less their energy."""
    centre = train.mean(axis=0)
    inside = np.linalg.svd(train - centre, full_matrices=False)[2][:dimensions].T

    def rest(rows: np.ndarray) -> np.ndarray:
        gaps = rows - centre
        return np.sqrt(np.maximum((gaps**2).sum(axis=1) - ((gaps @ inside) ** 2).sum(axis=1), 0))

    scale = _logits(head, train).max(axis=1).mean() / rest(train).mean()
    return lambda rows: scale * rest(_unit(rows)) - np.logaddexp.reduce(_logits(head, rows), axis=1)


def _peers(features: np.ndarray, labels: np.ndarray, head: LogisticRegression) -> dict[str, Distances]:
    try:
        from pytorch_ood.detector import KNN, RMD, EnergyBased, Mahalanobis
    except ImportError:
        print("pytorch-ood is not installed: its rows are missing")
        return {}
    import torch

    y = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    methods: dict[str, Distances] = {
        "pytorch-ood EnergyBased": lambda rows: EnergyBased.score(torch.from_numpy(_logits(head, rows))).numpy()
    }
    for suffix, change in (("", lambda rows: rows), (", unit vectors", _unit)):
        z = torch.from_numpy(change(features))
        for name, detector in (
            ("KNN", KNN(None, k=min(50, len(z)))),
            ("Mahalanobis", Mahalanobis(None)),
            ("RMD", RMD(None)),
        ):
            fitted = detector.fit_features(z, y)
            methods[f"pytorch-ood {name}{suffix}"] = partial(_predicted, fitted, change)
    return methods


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

    whitening = np.linalg.cholesky(precision.astype(np.float64))
    centre = means.mean(axis=0)
    white_means = (means - centre) @ whitening

    def distances(rows: np.ndarray) -> np.ndarray:
        return cdist((change(rows) - centre) @ whitening, white_means, "sqeuclidean").min(axis=1)

    return distances


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def cost(classifier: Classifier, rounds: int = 30) -> dict[str, float]:
    """Return the processor time for one image, in milliseconds: the forward pass, and its familiarity with 2,000 training images."""
    import torch

    rows = np.random.default_rng(SEED).normal(size=(2000, WIDEST)).astype(np.float16)
    empty = tuple((row % 10,) for row in range(2000)), np.zeros((2000, 32), np.uint8), ("",) * 2000, (b"",) * 2000
    training = TrainingFeatures(1280, rows, *empty, np.linspace(0, 1, 1000, dtype=np.float32), DISTANCES[0])
    image, embedding = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), torch.ones(1, 1280)
    computed: list[tuple[str, Callable[[Any], Any], Any]] = [("forward_ms", classifier, image)]
    for name in DISTANCES:
        familiarity = Familiarity(replace(training, distance=name), torch.device("cpu"))
        computed.append((f"familiarity_{name}_ms", familiarity, embedding))
    times: dict[str, list[float]] = {name: [] for name, _, _ in computed}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, compute, given in computed:
                start = time.thread_time()
                compute(given)
                times[name].append(1000 * (time.thread_time() - start))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def _embedder(model: EmbeddingModel, folder: Path) -> Callable[[Sequence[Sample]], np.ndarray]:
    stored = Stored(model, FeatureStore(folder, model.key, model.record))

    def embed_samples(samples: Sequence[Sample]) -> np.ndarray:
        return stored.store.vectors([key for key in stored.embedded(samples).keys if key is not None])

    return embed_samples


def _far(photos: Sequence[Path], most: int) -> dict[str, list[Sample]]:
    digits = load_digits().images[:most].astype(np.uint8) * 16
    noise = np.random.default_rng(SEED).integers(0, 256, (min(most, 50), SIZE, SIZE, 3), dtype=np.uint8)
    far = {
        name: [Sample(name, (), data=data) for data in _png(images)]
        for name, images in (("digits", digits), ("noise", noise))
    }
    for folder in photos:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
        chosen = np.random.default_rng(SEED).permutation(len(paths))[:most]
        far[folder.name] = [Sample(str(paths[index]), ()) for index in chosen]
    return far


def _png(images: np.ndarray) -> Iterator[bytes]:
    for image in images:
        yield bytes(cv2.imencode(".png", cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC))[1])


def _drawn(folder: Path, classes: list[str], most: int) -> tuple[list[Sample], list[str]]:
    paths = [path for name in classes for path in sorted((folder / name).iterdir())]
    order = np.random.default_rng(SEED).permutation(len(paths))[:most]
    return [Sample(str(paths[i]), ()) for i in order], [paths[i].parent.name for i in order]
