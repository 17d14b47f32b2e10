"""Measure exports in their own runtimes, compared with the bundle in the server's engine.

    python -m benchmarks.export --json benchmarks/results/export.json
    python -m benchmarks.export --network timm/resnet18 --size 224 --seconds 2

A bundle with random weights of `--network` is exported to each target, and to 8-bit integers where a target has them: speed and size do not
depend on the weights. Each export and each of `--backends` of `refract serve` computes the same preprocessed images: one image a call
(`latency_ms`, median and 95th percentile) and batches of 16 (`images_a_second`, from the median), with PyTorch's number of threads, which
OMP_NUM_THREADS sets. `export_s` is a whole export with its check, without imports and without loading the bundle. `peer` is the same
network in plain PyTorch in this process. A target or a backend that is not installed is reported with its reason.
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.report import environment, summary, write

BATCH = 16
GOAL_S = 60
"""Seconds that an export of ResNet-50 may take."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", default="timm/resnet50", help="a network of timm, whose folder `hf` is measured too"
    )
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels (default 224)")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each measurement (default 10)")
    parser.add_argument(
        "--backends",
        nargs="*",
        default=["eager", "openvino", "openvino-int8", "onnx", "onnx-int8"],
        help="backends of the server to compare with",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import torch

    from refract.models.bundle.bundle import BundleError
    from refract.models.conversion.deployable import Deployable
    from refract.pipeline.export.export import DESCRIPTION, export
    from refract.pipeline.export.int8 import Int8
    from refract.pipeline.export.target import ExportError
    from refract.pipeline.export.targets import TARGETS
    from refract.serve.runtime.engine import Engine

    exports: dict[str, Any] = {}
    backends: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = _bundle(folder / "bundle", args.network, args.size)
        images = np.random.default_rng(0).integers(0, 256, (BATCH, args.size, args.size, 3), dtype=np.uint8)
        for name, module in TARGETS.items():
            target = importlib.import_module(module).TARGET
            for label, int8 in ((name, None), (f"{name}-int8", Int8(None, None, 100.0))):
                if int8 is not None and not target.int8:
                    continue
                started = perf_counter()
                try:
                    done = export(bundle, name, folder / label, int8)
                except ExportError as err:
                    exports[label] = {"refused": str(err)}
                else:
                    seconds = perf_counter() - started
                    network = sum(size for file, size in done.sizes.items() if Path(file).name.startswith("model."))
                    run = target.run(done.folder, json.loads((done.folder / DESCRIPTION).read_text("utf-8")))
                    exports[label] = {
                        "export_s": round(seconds, 1), "network_mb": round(network / 1e6, 2), "files": done.sizes,
                        "largest_difference": float(f"{done.comparison.largest:.2g}"), **_speed(run, images, args.seconds),
                    }  # fmt: skip
                print(label, exports[label], flush=True)
        plain = Deployable(bundle.classifier(), task=bundle.info.task, temperature=bundle.info.temperature)

        def peer(batch: np.ndarray) -> object:
            with torch.inference_mode():
                return plain(torch.from_numpy(batch))[0].numpy()

        plain_pytorch = _speed(peer, images, args.seconds)
        print("plain PyTorch", plain_pytorch, flush=True)
        for name in args.backends:
            try:
                backends[name] = _speed(Engine(bundle, backend=name).predict, images, args.seconds)
            except BundleError as err:
                backends[name] = {"refused": str(err)}
            print(name, backends[name], flush=True)
    slowest = max((row["export_s"] for row in exports.values() if "export_s" in row), default=None)
    report = {
        "environment": environment("torch", "timm", "onnxruntime", "openvino") | {"threads": torch.get_num_threads()},
        "network": args.network, "image_size": args.size, "batch": BATCH, "goal_export_s": GOAL_S, "slowest_export_s": slowest,
        "exports": exports, "peer": plain_pytorch, "backends": backends,
    }  # fmt: skip
    if args.json:
        write(args.json, report)
    return 0


def _bundle(path: Path, network: str, side: int) -> Any:
    """Save a bundle of an untrained network, with eight golden samples."""
    import torch

    from refract.augment.preprocess import Preprocess
    from refract.models.bundle.bundle import BundleInfo, GoldenSample, load_bundle, save_bundle
    from refract.models.classifier import Classifier, probabilities
    from refract.models.registry import build

    torch.manual_seed(0)
    preprocess = Preprocess(side, side)
    classifier = Classifier(
        build(network, 1000, image_size=(side, side)), mean=preprocess.mean, std=preprocess.std
    ).eval()
    goldens = []
    for number in range(8):
        data = _png(number, side)
        with torch.inference_mode():
            rows = probabilities(
                classifier(torch.from_numpy(preprocess(data)).permute(2, 0, 1)[None]), task="multiclass"
            )
        goldens.append(GoldenSample(f"{number:02}.png", data, tuple(map(float, rows[0]))))
    info = BundleInfo(
        name="export", task="multiclass", labels=tuple(map(str, range(1000))), preprocess=preprocess.to_dict(),
        network={"name": network, "image_size": [side, side], "args": {}}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return load_bundle(save_bundle(path, info, classifier, goldens))


def _png(seed: int, side: int) -> bytes:
    import cv2

    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(small, (side + 32, side + 32), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def _speed(run: Callable[[np.ndarray], object], images: np.ndarray, seconds: float) -> dict[str, Any]:
    """Time single images, then batches, each for `seconds` after one call to warm up."""
    single, batches = (_times(run, part, seconds) for part in (images[:1], images))
    return {
        "latency_ms": summary([1e3 * value for value in single]),
        "images_a_second": round(len(images) / summary(batches)["median"], 1),
        "batches": len(batches),
    }


def _times(run: Callable[[np.ndarray], object], images: np.ndarray, seconds: float) -> list[float]:
    run(images)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        started = perf_counter()
        run(images)
        times.append(perf_counter() - started)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
