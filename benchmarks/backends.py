"""Measure how each of the server's backends differs from plain float32 on labelled images, and how fast it is.

Run it before you serve with `--backend int8`.

    python -m benchmarks.backends BUNDLE DATA --json benchmarks/results/backends.json

Each backend computes the same images in batches of 32, with one thread or all, as its selection decides; the rate is the median over the
batches. `right`: fraction of right predictions; `same`: fraction of predictions equal to those of float32; `off`: change of the
probability of float32's label. A backend that is not installed, or not usable for this bundle, is reported with its reason.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.report import environment, write

BATCH = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder of a bundle with one label per image")
    parser.add_argument(
        "data", help="a folder (CLASS/… or train|val|test/CLASS/…), or a manifest; uses its test split if it has one"
    )
    parser.add_argument(
        "--images", type=int, default=3000, help="maximum number of images, evenly spread over the data"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from refract.models.bundle.bundle import BundleError, load_bundle
    from refract.pipeline.data.manifest import DataError, load_manifest
    from refract.pipeline.evaluation.test_data import relabelled
    from refract.serve.runtime.backends.registry import BACKENDS
    from refract.serve.runtime.engine import Engine

    if args.images < 1:
        parser.error("--images: expected at least 1")
    try:
        bundle = load_bundle(args.bundle)
        if bundle.info.task == "multilabel":
            parser.error("the bundle is multi-label; expected one label per image")
        manifest = load_manifest(args.data, "multiclass")
        known = relabelled(manifest, bundle.info.labels)
    except (BundleError, DataError) as err:
        parser.error(str(err))
    samples = [s for s in known if s.split == "test" or "test" not in manifest.splits()]
    samples = samples[:: -(-len(samples) // args.images)]
    truth = np.array([sample.labels[0] for sample in samples])
    plain = Engine(bundle)
    images = np.stack([plain.preprocess(sample.read()) for sample in samples])

    rows: dict[str, dict[str, Any]] = {}
    sure, _ = _asked(plain, images)
    label = sure.argmax(1)
    for name in BACKENDS:
        try:
            given, rate = _asked(Engine(bundle, backend=name), images)
        except BundleError as err:
            rows[name] = {"refused": str(err)}
        else:
            off = np.abs(given - sure)[np.arange(len(label)), label]
            rows[name] = {
                "images_a_second": round(rate, 1),
                "right": round(float((given.argmax(1) == truth).mean()), 4),
                "same": round(float((given.argmax(1) == label).mean()), 4),
                "off": {"mean": round(float(off.mean()), 5), "max": round(float(off.max()), 5)},
            }
        print(name, rows[name], flush=True)
    if args.json:
        machine = environment("torch", "openvino", "onnxruntime")
        facts = {"bundle": bundle.info.name, "digest": bundle.digest[:16], "images": len(samples), "batch": BATCH}
        write(args.json, {"environment": machine, **facts, "backends": rows})
    return 0


def _asked(engine: Any, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (probabilities as float32 N×C, images per second)."""
    engine.predict(images[:BATCH])
    parts, rates = [], []
    for start in range(0, len(images), BATCH):
        began = perf_counter()
        parts.append(engine.predict(images[start : start + BATCH]))
        rates.append(len(parts[-1]) / (perf_counter() - began))
    return np.concatenate(parts), median(rates)


if __name__ == "__main__":
    raise SystemExit(main())
