"""The time until the next item of a large review, and the memory that decisions take.

The session has --items items with random vectors, and the image of each is the same photo of 0.25 megapixels. STEPS times, one reviewer
decides on the first open item; then the next one is listed with its nearest images, and its image is encoded. Decisions are written to a
label history on disk. The page loads the following images ahead, so a reviewer waits less than these times.
"""

import argparse
import gc
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from benchmarks.report import environment, summary, write
from refract.pipeline.data.manifest import Sample
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.review.data import Predictions, ReviewData
from refract.pipeline.review.decisions import Decisions
from refract.pipeline.review.items import Item
from refract.pipeline.review.session import ReviewSession

STEPS, CLASSES, WIDTH = 2000, 10, 512
GOAL_MS = 50


def session(items: int, folder: Path, rng: np.random.Generator) -> ReviewSession:
    """Return a session in which each item is in the audit, and a fifth in the queue of likely label errors."""
    pixels = cv2.resize(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), (578, 433), interpolation=cv2.INTER_CUBIC)
    photo = bytes(cv2.imencode(".jpg", pixels)[1])
    labels = tuple(f"class {c}" for c in range(CLASSES))
    truth = rng.integers(0, CLASSES, items)
    rows = rng.dirichlet(np.ones(CLASSES), items).astype(np.float32)
    vectors = rng.standard_normal((items, WIDTH), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shown = tuple(
        Item(i, f"{i:064x}", Sample(f"{i}.jpg", (int(truth[i]),), data=photo), f"{i}.jpg", (labels[truth[i]],))
        for i in range(items)
    )
    data = ReviewData(
        shown, labels, items, vectors, np.eye(CLASSES, dtype=bool)[truth], rows,
        Predictions(labels, (), np.zeros((0, CLASSES), np.float32)),
    )  # fmt: skip
    return ReviewSession("benchmark", data, Decisions(LabelHistory(folder / "labels.db", create=True)))


def _megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(args: argparse.Namespace) -> int:
    """Run the stage, print and write its result. Returns 1 if the 95th percentile of the next item is above GOAL_MS."""
    with TemporaryDirectory() as folder:
        review = session(args.items, Path(folder), np.random.default_rng(args.seed))
        times: dict[str, list[float]] = {"next item": [], "decision": [], "counts of all queues": []}
        memory = []
        for step in range(STEPS):
            queue = ("label-errors", "audit")[step % 2]
            started = time.perf_counter()
            (entry,) = review.open_entries(queue, "ann", count=1)
            review.neighbours(entry.item)
            review.image(entry.item, 1024)
            times["next item"].append(1000 * (time.perf_counter() - started))
            started = time.perf_counter()
            review.decide(entry.item, action="confirm", labels=(), reviewer="ann", queue=queue)
            times["decision"].append(1000 * (time.perf_counter() - started))
            if step % 20 == 0:
                started = time.perf_counter()
                for one in review.queues:
                    review.open_count(one.name, "ann")
                times["counts of all queues"].append(1000 * (time.perf_counter() - started))
                gc.collect()
                memory.append(_megabytes())
    rows: dict[str, Any] = {name: summary(values) for name, values in times.items()}
    for name, row in rows.items():
        print(f"{name:22} median {row['median']:.1f} ms, p95 {row['p95']:.1f} ms")
    grown = memory[-1] - memory[len(memory) // 4]
    print(f"memory: {memory[-1]:.0f} MB, {grown:+.1f} MB in the last three quarters of {STEPS:,} decisions")
    if args.json:
        facts = {
            "items": args.items,
            "decisions": STEPS,
            "milliseconds": rows,
            "megabytes": round(memory[-1], 1),
            "grown": round(grown, 1),
        }
        write(args.json, {**environment("numpy", "opencv-python-headless"), "stage": args.stage, **facts})
    return 0 if rows["next item"]["p95"] < GOAL_MS else 1
