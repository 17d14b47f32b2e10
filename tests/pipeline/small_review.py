"""A small review for tests: a real session and a real label history over painted images, and a real server on a real port."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
from small_data import make_image, write_image
from starlette.applications import Starlette

from refract.models.hierarchy import Hierarchy
from refract.pipeline.data.manifest import Sample
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.review.data import Captured, Predictions, ReviewData
from refract.pipeline.review.decisions import Decisions
from refract.pipeline.review.images import HeatMaps
from refract.pipeline.review.items import Item, Prediction
from refract.pipeline.review.server import ReviewServer, listen, url
from refract.pipeline.review.session import ReviewSession

LABELS = ("blue", "green", "red")
WRONG = (3, 7, 11)
"""Items whose label the predictions contradict; the one that the item has is the second most probable."""


def small_data(
    folder: Path, history: LabelHistory, *, count: int = 24, new: int = 4, multilabel: bool = False, labels=LABELS,
    hierarchy: Hierarchy | None = None,
) -> ReviewData:  # fmt: skip
    """`count` labelled images and `new` ones, the first half of which a server captured. 0 and 1 are near-duplicates with other labels."""
    rng = np.random.default_rng(0)
    targets = np.zeros((count, len(labels)), bool)
    rows = np.full((count + new, len(labels)), 0.02, np.float32)
    items = []
    for index in range(count + new):
        label = index % len(LABELS)
        file = folder / f"{index:03}.png"
        write_image(file, cv2.resize(make_image(LABELS[label], index), (64, 48)))
        best = (label + 1) % len(LABELS) if index in WRONG else label
        rows[index, label], rows[index, best] = 0.2, 0.9
        if index < count:
            targets[index, label] = True
        order = np.argsort(-rows[index], kind="stable")[:5]
        items.append(
            Item(
                index,
                hashlib.sha256(file.read_bytes()).hexdigest(),
                Sample(str(file), (label,) if index < count else ()),
                history.relative(file),
                (labels[label],) if index < count else (),
                split="train" if index < count else "",
                predictions=tuple(Prediction(labels[i], round(float(rows[index, i]), 4)) for i in order),
                familiarity=None if index < count else 0.25,
            )
        )
    vectors = rng.normal(size=(count + new, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fresh = tuple(range(count, count + new))
    return ReviewData(
        tuple(items), tuple(labels), count, vectors, targets, rows[:count] / rows[:count].sum(axis=1, keepdims=True),
        Predictions(tuple(labels), fresh, rows[count:]), multilabel=multilabel, alike=[(0, 1)],
        captured={index: Captured(0.4, ("red",)) for index in fresh[: new // 2]}, hierarchy=hierarchy,
    )  # fmt: skip


def small_session(folder: Path, *, heat_maps: HeatMaps | None = None, **options) -> ReviewSession:
    """A review of `small_data` in `folder`, with the label history `folder/labels.db`."""
    history = LabelHistory(folder / "labels.db", create=True)
    data = small_data(folder, history, **options)
    return ReviewSession("photos", data, Decisions(history), heat_maps=heat_maps, collected=folder / "collected")


@contextlib.contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[httpx.Client]:
    """Run the application on a port, a free one by default, in a thread; yield a client."""
    ready = threading.Event()
    with listen("127.0.0.1", port) as bound:
        server = ReviewServer(app, on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        with httpx.Client(base_url=url(bound), timeout=30, trust_env=False) as client:
            thread.start()
            try:
                assert ready.wait(30), "the server did not start"
                yield client
            finally:
                server.should_exit = True
                thread.join()
