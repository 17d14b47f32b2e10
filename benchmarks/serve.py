"""Compare the server with its peers: the same network, the same images, and the same load from a second process.

Refract runs with its defaults and the backend that it selects. With one engine per core, it also runs with that backend, `int8` and
`eager`. The peers are a plain FastAPI handler, LitServe, and `mlflow models serve`, each with one worker per core.
The weights are random, so the predictions are compared and not judged. Exit code 1 if a ratio misses its goal.

    python -m benchmarks.serve --images PHOTOS --json benchmarks/results/serve.json
"""

import argparse
import base64
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import environment, write
from benchmarks.servers.start import make_bundle, serving

GOALS = {"plain FastAPI": 3.0, "LitServe": 4.0, "mlflow models serve": 5.0}
"""Refract's rate with one engine per core as a multiple of the peer's with one worker per core, at the highest load.

A peer's goal holds for the selected backend and for `int8`. Against LitServe, `eager` takes the place of the selected backend."""

OF_ENGINE, TAIL = 0.85, 2.5
"""OF_ENGINE: rate of one engine per core as a fraction of the bare rate of one engine with the threads that it selects. TAIL: p99 at half
load as a multiple of one image's time in the engine."""


@dataclass(frozen=True)
class Server:
    """command: with PORT and BUNDLE; form: see `benchmarks.load`; needs: a package."""

    command: tuple[str, ...]
    route: str
    form: str
    health: str = "/readyz"
    needs: str | None = None
    environ: dict[str, str] = field(default_factory=dict)


PYTHON = (sys.executable, "-m")
OWN = (*PYTHON, "refract", "serve", "BUNDLE", "--port", "PORT")
PLAIN = (*PYTHON, "uvicorn", "benchmarks.servers.plain:app", "--port", "PORT", "--workers", "2")
MLFLOW = (
    *PYTHON,
    "mlflow",
    "models",
    "serve",
    "-m",
    "BUNDLE/../mlflow",
    "--env-manager",
    "local",
    "--port",
    "PORT",
    "--workers",
    "2",
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
ENGINES = (*OWN, "--replicas", "2")
# The peers have two workers of one thread each: on two cores faster than one of two threads.
SERVERS = {
    "Refract": Server(OWN, "/v1/predict?top=1", "raw"),
    "Refract, engines": Server(ENGINES, "/v1/predict?top=1", "raw"),
    "Refract, eager": Server((*ENGINES, "--backend", "eager"), "/v1/predict?top=1", "raw"),
    "Refract, int8": Server((*ENGINES, "--backend", "int8"), "/v1/predict?top=1", "raw"),
    "plain FastAPI": Server(PLAIN, "/predict", "multipart", environ=ONE_THREAD),
    "LitServe": Server(
        (*PYTHON, "benchmarks.servers.lit", "PORT", "2"), "/predict", "json", "/health", "litserve", ONE_THREAD
    ),
    "mlflow models serve": Server(MLFLOW, "/invocations", "mlflow", "/ping", "mlflow", ONE_THREAD),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photos")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--quick", action="store_true", help="resnet18, 8 connections, 4 seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.networks, args.connections, args.seconds = ["resnet18"], [8], 4.0
    files = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:60]
    measurements: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = [sys.executable, "-m", "benchmarks.servers.mlflow_model", f"{folder}/mlflow"]
        golden_samples = [file.read_bytes() for file in files]
        for network in args.networks:
            bundle = make_bundle(network, golden_samples, Path(folder) / network)
            if not Path(f"{folder}/mlflow").exists():
                subprocess.run(
                    model, check=True, capture_output=True, env={**os.environ, "REFRACT_BENCH_BUNDLE": str(bundle)}
                )
            measurements[network] = measured(bundle, files, args)
        measurements["tiny"] = tiny(files, Path(folder) / "tiny", args.seconds)
    goals = [line for network in args.networks for line in held(network, measurements[network])]
    rate = measurements["tiny"]["Refract"]["rate"]
    goals.append((f"lenet5, 16 connections: {rate:.0f} images per second (goal 4000)", rate >= 4000))
    for line, _ in goals:
        print(line)
    result = {
        "environment": environment("torch", "fastapi", "uvicorn", "litserve", "mlflow", "openvino", "onnxruntime"),
        "networks": measurements,
        "goals": [line for line, _ in goals],
        "holds": all(good for _, good in goals),
    }
    if args.json:
        write(args.json, result)
    return 0 if result["holds"] else 1


def measured(bundle: Path, files: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Return server → connections → measurements of `benchmarks.load`, and each server's predictions for the same images."""
    rows: dict[str, Any] = {}
    engine = [bare(bundle, files)]
    for name, server in SERVERS.items():
        if server.needs and importlib.util.find_spec(server.needs) is None:
            continue
        with serving(list(server.command), bundle, server.health, **server.environ) as (url, _):
            loads = {str(n): load(url + server.route, files, server.form, n, args.seconds) for n in args.connections}
            row: dict[str, Any] = {"loads": loads}
            if name.startswith("Refract"):
                with urllib.request.urlopen(url + "/v1/model", timeout=60) as about:
                    row["backend"] = json.load(about)["backend"]["name"]
                # Requests at a fixed rate, whether or not the previous one has its response.
                half = max(row["rate"] for row in loads.values()) / 2
                row["half_load"] = load(url + server.route, files, server.form, 16, args.seconds, rate=half)
            labels = [answered(url + server.route, file, server.form) for file in files[:20]]
        rows[name] = {**row, "labels": labels}
        print(f"{bundle.name:<10} {name:<15} {row}", flush=True)
        # Measured before and after Refract's servers: the machine's speed changes within the minutes that the peers take.
        if name == "Refract, engines":
            engine.append(bare(bundle, files))
    wanted = rows["Refract, eager"]["labels"]
    for row in rows.values():
        row["same_answers_of_20"] = sum(a == b for a, b in zip(row.pop("labels"), wanted, strict=True))
    rows["bare engine"] = {size: round(sum(run[size] for run in engine) / len(engine), 1) for size in engine[0]}
    print(f"{bundle.name:<10} bare engine     {rows['bare engine']}", flush=True)
    return rows


def tiny(files: list[Path], folder: Path, seconds: float) -> dict[str, Any]:
    """Measure lenet5 on images of 32×32, where nearly all of the time is spent outside the network."""
    from PIL import Image

    folder.mkdir()
    for number, file in enumerate(files):
        Image.open(file).convert("RGB").resize((32, 32)).save(folder / f"{number}.jpg", quality=90)
    small = sorted(folder.glob("*.jpg"))
    bundle = make_bundle("lenet5", [file.read_bytes() for file in small], folder / "lenet5", size=32)
    rows = {}
    for name in ("Refract", "LitServe"):
        server = SERVERS[name]
        if server.needs and importlib.util.find_spec(server.needs) is None:
            continue
        with serving(list(server.command), bundle, server.health, **server.environ) as (url, _):
            rows[name] = load(url + server.route, small, server.form, 16, seconds)
            print(f"lenet5     {name:<15} {rows[name]}", flush=True)
    return rows


def load(url: str, files: list[Path], form: str, connections: int, seconds: float, rate: float = 0) -> dict[str, Any]:
    """Run `benchmarks.load` in a separate process and return its measurements."""
    options = ["--connections", str(connections), "--seconds", str(seconds), "--form", form, "--rate", str(rate)]
    run = [sys.executable, "-m", "benchmarks.load", url, *map(str, files), *options]
    measurements: dict[str, Any] = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    return measurements


def bare(bundle: Path, files: list[Path]) -> dict[str, float]:
    """Return batch size → images per second of the engine that Refract selects, in a separate process, on decoded images."""
    code = (
        "import json, sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from refract.models.bundle.bundle import load_bundle\n"
        "from refract.serve.runtime.engine import Engine\n"
        "from refract.models.allocator import keep_freed_memory\n"
        "keep_freed_memory(at_most=1 << 30)\n"
        "engine = Engine(load_bundle(Path(sys.argv[1])), backend='auto')\n"
        "rows = [engine.preprocess(Path(file).read_bytes()) for file in sys.argv[2:]]\n"
        "found = {}\n"
        "for size in (1, 8, 32):\n"
        "    batch, times = np.stack((rows * size)[:size]), []\n"
        "    while sum(times) < 3:\n"
        "        began = time.perf_counter(); engine.predict(batch); times.append(time.perf_counter() - began)\n"
        "    found[size] = round(size / sorted(times)[len(times) // 2], 1)\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), *map(str, files[:32])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": str(bundle.parent)},
    )
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def answered(url: str, image: Path, form: str) -> str:
    """Return the label that a server predicts for an image."""
    data, kind = image.read_bytes(), "image/jpeg"
    if form == "mlflow":
        data, kind = json.dumps({"inputs": [base64.b64encode(data).decode()]}).encode(), "application/json"
    elif form == "json":
        data, kind = json.dumps({"image": base64.b64encode(data).decode()}).encode(), "application/json"
    elif form == "multipart":
        kind = "multipart/form-data; boundary=b"
        data = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n' + data + b"\r\n--b--\r\n"
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        content = json.loads(answer.read())
    return str(content["predictions"][0]["label"] if "predictions" in content else content["label"])


def held(network: str, rows: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield (line, whether the goal is reached) for each goal, at the load with the most connections."""
    busiest = max(rows["Refract"]["loads"], key=int)
    for peer, goal in GOALS.items():
        if peer not in rows:
            continue
        for variant in ("Refract, eager" if peer == "LitServe" else "Refract, engines", "Refract, int8"):
            ratio = rows[variant]["loads"][busiest]["rate"] / max(rows[peer]["loads"][busiest]["rate"], 1e-9)
            same = f"{rows[variant]['same_answers_of_20']} and {rows[peer]['same_answers_of_20']} of 20 predictions equal those of eager"
            yield (
                f"{network}, {busiest} connections: {variant} {ratio:.2f} × {peer} (goal {goal}), {same}",
                ratio >= goal,
            )
    served = rows["Refract, engines"]["loads"][busiest]["rate"]
    share = served / max(rows["bare engine"].values())
    yield f"{network}: {share:.2f} of the bare engine's rate (goal {OF_ENGINE})", share >= OF_ENGINE
    tail = rows["Refract"]["half_load"]["p99"] / (1000 / rows["bare engine"]["1"])
    yield f"{network}: p99 at half load is {tail:.1f} × one image's time in the engine (goal {TAIL})", tail <= TAIL


if __name__ == "__main__":
    sys.exit(main())
