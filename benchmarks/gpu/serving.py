"""ResNet-50 and ViT-B/16 with random weights: each backend at several batch sizes, then JPEG uploads over HTTP from a second process.

The server computes by the fastest one of all but `compiled`. `compiled` is measured last, as its compilation may take the remaining time.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.data import jpegs, write_jpegs
from benchmarks.gpu.plan import BACKENDS, BATCHES, SERVED, Clock, Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import device_facts, timed

if TYPE_CHECKING:
    import numpy as np

    from refract.models.bundle.bundle import Bundle
    from refract.serve.runtime.engine import Engine

CONNECTIONS, HALF_CONNECTIONS = 64, 32
MAX_WAIT_MS = 2.0
"""The server's default for --max-wait-ms, which is given to it."""

TAIL = 2.5
COMPILING_S = 40.0
"""Seconds that must be left for a compilation."""


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `serving`."""
    import refract.cli

    refract.cli.prepare_to_compute()
    quick, side = options.quick, 32 if options.quick else 224
    record.fact(
        **device_facts(options.device), side=side, image=[375, 500], connections=CONNECTIONS, max_wait_ms=MAX_WAIT_MS
    )
    images = jpegs(8 if quick else 64, height=375, width=500)
    files = write_jpegs(options.work / "jpegs", images)
    served = SERVED[:1] if quick else SERVED
    bundles = {}
    for place, name in enumerate(served):
        part = Clock((clock.left - (0 if quick else COMPILING_S)) / (len(served) - place))
        bundles[name] = _network(name, images, files, options, record, part)
    for name, bundle in bundles.items():
        if (reason := _uncompiled(options, clock)) is None:
            _backend(name, bundle, "compiled", images, options, record, 0.2 * clock.left)
        for size in BATCHES if reason else ():
            record.skip(f"{name} compiled, batch {size}", str(reason))
    if quick:
        record.skip_rest("not part of --quick")


def _uncompiled(options: Options, clock: Clock) -> str | None:
    """Why the network is not compiled, None where it can be."""
    if options.device == "cpu":
        return "the network is compiled on a GPU alone"
    return None if clock.left >= COMPILING_S else f"{clock.left:.0f} s left; a compilation needs {COMPILING_S:g}"


def _network(
    name: str, images: list[bytes], files: list[Path], options: Options, record: Record, clock: Clock
) -> "Bundle":
    """Measure all but the compiled backend."""
    from benchmarks.servers.start import make_bundle
    from refract.models.bundle.bundle import load_bundle

    quick = options.quick
    path = make_bundle("lenet5" if quick else name, images[:8], options.work / name, size=32 if quick else 224)
    bundle, rates = load_bundle(path), dict[str, dict[int, float]]()
    for backend in BACKENDS[:-1]:
        rates[backend] = _backend(name, bundle, backend, images, options, record, 0.07 * clock.left)
    best = max(rates, key=lambda backend: rates[backend].get(32, 0.0))
    single = 1000 / rates[best][1]
    record.measure(f"{name} batch-1 inference", single)
    decoding = _decoding(bundle, images, seconds=0.5 if quick else 2)
    record.measure(f"{name} JPEG decoding", decoding)
    _http(name, path, files, best, min(max(rates[best].values()), decoding), single, options, record, clock)
    return bundle


def _backend(
    name: str, bundle: "Bundle", backend: str, images: list[bytes], options: Options, record: Record, seconds: float
) -> dict[int, float]:
    """Batch size → images a second, the copies to and from the device included; empty where the backend refuses the bundle."""
    import numpy as np

    from refract.models.bundle.bundle import BundleError
    from refract.serve.runtime.engine import Engine

    rates: dict[int, float] = {}
    try:
        engine = Engine(bundle, options.device, backend)
    except BundleError as err:
        for size in BATCHES:
            record.skip(f"{name} {backend}, batch {size}", str(err))
        return rates
    rows = [engine.preprocess(data) for data in images]
    for size in reversed(BATCHES):  # a compiled network is compiled once more for a batch of one
        batch = np.stack((rows * (1 + size // len(rows)))[:size])
        rates[size] = size / _predict(engine, batch, options, seconds / len(BATCHES))
        record.measure(f"{name} {backend}, batch {size}", rates[size])
    return rates


def _predict(engine: "Engine", batch: "np.ndarray", options: Options, seconds: float) -> float:
    return timed(lambda: engine.predict(batch), options.device, seconds=seconds, rounds=2 if options.quick else 100)


def _decoding(bundle: "Bundle", images: list[bytes], *, seconds: float) -> float:
    """Images a second that the processor decodes and resizes, on all cores."""
    from refract.augment.preprocess import Preprocess

    preprocess, count = Preprocess.from_dict(bundle.info.preprocess), len(images)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        took = timed(lambda: list(pool.map(preprocess, images)), "cpu", seconds=seconds, warm_up=1)
    return count / took


def _http(
    name: str, bundle: Path, files: list[Path], backend: str, bound: float, single: float, options: Options, record: Record,
    clock: Clock,
) -> None:  # fmt: skip
    """Load the server from a second process. bound: the smaller one of engine and decoding rate; single: ms of a batch-1 inference."""
    from benchmarks.serve import load
    from benchmarks.servers.start import serving

    quick = options.quick
    seconds = 1.0 if quick else max(2.0, min(8.0, 0.15 * clock.left))
    command = [sys.executable, "-m", "refract", "serve", "BUNDLE", "--port", "PORT", "--device", options.device]
    command += ["--backend", backend, "--max-wait-ms", str(MAX_WAIT_MS)]
    with serving(command, bundle) as (url, _):
        route = f"{url}/v1/predict?top=1"
        limit = load(route, files, "raw", 4 if quick else CONNECTIONS, seconds)
        half = load(route, files, "raw", 4 if quick else HALF_CONNECTIONS, seconds, rate=limit["rate"] / 2)
    record.fact(**{f"{name} served by": backend, f"{name} statuses": limit["statuses"]})
    record.measure(f"{name} HTTP at the limit", limit["rate"])
    for where, measurements in (("at the limit", limit), ("at half load", half)):
        record.measure(f"{name} p50 {where}", measurements["p50"])
        record.measure(f"{name} p99 {where}", measurements["p99"])
    record.measure(f"{name} HTTP / min(engine, decoding)", limit["rate"] / bound)
    record.measure(f"{name} p99 at half load / (2.5 × inference + wait)", half["p99"] / (TAIL * single + MAX_WAIT_MS))
