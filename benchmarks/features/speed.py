"""How long heads and a search take on stored embeddings, and how fast images are embedded.

Heads and search get 10,000 random embeddings of 1,280 features in ten classes. Each head is fitted on four fifths of them and chosen on the
rest; scikit-learn fits the same five strengths. The images of --data are embedded by tf_efficientnet_lite0 with ImageNet weights; the bare
rate is that of the network alone, on the same images in memory, in this process.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pretrained import NAME, lite0_weights
from benchmarks.report import environment, summary, write
from refract.pipeline.features.embed import Options, embed
from refract.pipeline.features.heads import MODES, STRENGTHS, Part, fit_head
from refract.pipeline.features.index import CosineIndex, normalised
from refract.pipeline.features.model import open_model
from refract.pipeline.features.search import SearchIndex, nearest
from refract.pipeline.features.source import samples_of
from refract.pipeline.features.store import FeatureStore, Key, StoredSample, stored_models, write_vectors
from refract.pipeline.stopping import Stop

OUT = Path(__file__).parents[1] / "results" / "features_speed.json"
PARTS = ("heads", "search", "memory", "embedding")
QUERIES_ALONE = 200
COUNT, WIDTH, CLASSES, QUERIES, BATCH = 10_000, 1280, 10, 20, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="a folder of images, for `embedding`")
    parser.add_argument("--store", type=Path, help="a feature store of photos, for `memory`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="others stay in --out as they are")
    parser.add_argument("--images", type=int, default=1000, help="most images to embed")
    parser.add_argument("--size", type=int, default=224, help="of the network's input, pixels")
    parser.add_argument("--jobs", type=int, help="processes that embed")
    parser.add_argument("--out", type=Path, default=OUT)


def run(args: argparse.Namespace) -> None:
    torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])  # imports what a training has imported
    stages = {
        "heads": _heads,
        "search": _search,
        "memory": lambda: _memory(args.store),
        "embedding": lambda: _embedding(args),
    }
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    report |= {name: stages[name]() for name in args.parts}
    write(args.out, report | {"environment": environment("refract", "torch", "timm", "scikit-learn")})


def _clusters() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, CLASSES, COUNT)
    centres = 0.1 * draw.normal(size=(CLASSES, WIDTH))
    return np.maximum(0, centres[labels] + draw.normal(size=(COUNT, WIDTH))).astype(np.float32), labels


def _timed(work: Callable[[], object]) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
    }


def _heads() -> dict[str, dict[str, float]]:
    features, labels = _clusters()
    targets = np.eye(CLASSES, dtype=bool)[labels]
    first = COUNT * 4 // 5
    train, val = Part(features[:first], targets[:first]), Part(features[first:], targets[first:])
    timings = {f"refract {mode}": _timed(partial(fit_head, mode, train, val, multilabel=False)) for mode in MODES}

    def peer() -> None:
        from sklearn.linear_model import LogisticRegression

        models = [
            LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(train.features, labels[:first])
            for strength in STRENGTHS
        ]
        max(models, key=lambda model: model.score(val.features, labels[first:]))

    timings["scikit-learn"] = _timed(peer)
    for name, seconds in timings.items():
        print(f"{name:20} {seconds}", flush=True)
    return timings


def _search() -> dict[str, float]:
    features, _ = _clusters()
    with tempfile.TemporaryDirectory() as name:
        store = FeatureStore(Path(name), "0" * 64, {})
        samples = [StoredSample(f"{row:064x}", f"{row}.jpg") for row in range(COUNT)]
        for start in range(0, COUNT, 512):
            rows = slice(start, start + 512)
            write_vectors(
                store.folder, [Key(sample.content) for sample in samples[rows]], samples[rows], features[rows]
            )
        store.add_samples("source", samples)
        queries = features[:QUERIES] + 0.1
        times = []
        for _ in range(5):
            started = time.perf_counter()
            nearest(store, queries, 5)
            times.append(1000 * (time.perf_counter() - started) / QUERIES)
    measurements = {
        "stored": COUNT,
        "queries_at_once": QUERIES,
        **{f"milliseconds_{name}": value for name, value in summary(times).items()},
    }
    print(f"search               {measurements}", flush=True)
    return measurements


def _memory(folder: Path) -> dict[str, Any]:
    """Search in the stored photos with each of the last of them, which are not searched, one after another."""
    store = FeatureStore(folder, *next(stored_models(folder)))
    index = SearchIndex(store)
    vectors = store.vectors([Key(sample.content) for sample in index.samples])
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    searched, queries = vectors[:-QUERIES_ALONE], vectors[-QUERIES_ALONE:]
    measurements: dict[str, Any] = {"stored": len(searched)}
    units, small = normalised(searched), CosineIndex(searched)
    for name, work in (
        ("search", lambda query: small.nearest(query, 5)),
        ("one product and argpartition", lambda query: np.argpartition(units @ normalised(query)[0], -5)[-5:]),
    ):
        times = []
        for query in queries:
            started = time.thread_time()
            work(query[None])
            times.append(1000 * (time.thread_time() - started))
        measurements[name] = {f"processor_milliseconds_{key}": value for key, value in summary(times).items()}
    print(f"memory               {measurements}", flush=True)
    return measurements


def _embedding(args: argparse.Namespace) -> dict[str, Any]:
    samples, names = samples_of(str(args.data))
    samples, names = samples[: args.images], names[: args.images]
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(NAME, str(lite0_weights(Path(folder) / "lite0.safetensors")), args.size)
        store = FeatureStore(Path(folder) / "features", model.key, model.record)
        started = time.perf_counter()
        done = embed(model, samples, names, store, str(args.data), Options(jobs=args.jobs), Stop("now"))
        seconds = time.perf_counter() - started
    images = torch.from_numpy(np.stack([model.preprocess(sample.read()) for sample in samples[:BATCH]])).permute(
        0, 3, 1, 2
    )
    classifier = model.classifier.to(memory_format=torch.channels_last)
    rates = []
    with torch.inference_mode():
        for _ in range(max(2, len(samples) // BATCH)):
            started = time.perf_counter()
            classifier(images)
            rates.append(len(images) / (time.perf_counter() - started))
    measurements = {
        "images": len(samples), "computed": done.computed, "images_per_second": round(done.computed / seconds, 1),
        "bare_images_per_second": round(float(np.median(rates)), 1), "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(f"embedding            {measurements}", flush=True)
    return measurements
