"""The server beside its peers: the same network, the same pictures, each with the load of the same second process.

Refract by its chosen backend and by plain PyTorch, a plain FastAPI handler, and LitServe (pip install litserve; left out where it is not
there). Random weights: the answers are compared, not judged. Ends with 1 where a ratio falls short of its goal.

    python -m benchmarks.serve --pictures PHOTOS --json benchmarks/results/serve.json
"""

import argparse
import base64
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import environment, write

GOALS = {"plain FastAPI": 3.0, "LitServe": 4.0}
"""How many times the peer's rate at the busiest load; LitServe's against Refract's eager network."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of JPEG photos")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pictures = sorted(path for path in args.pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:60]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for network in args.networks:
            bundle = make_bundle(network, pictures, Path(folder) / network)
            found[network] = measured(bundle, pictures, args)
    goals = [line for network, rows in found.items() for line in held(network, rows)]
    for line, _ in goals:
        print(line)
    result = {
        "environment": environment("torch", "fastapi", "uvicorn"),
        "networks": found,
        "holds": all(good for _, good in goals),
    }
    if args.json:
        write(args.json, result)
    return 0 if result["holds"] else 1


def make_bundle(network: str, pictures: list[Path], path: Path) -> Path:
    """Random weights, whose first eight answers are its golden ones."""
    import numpy as np
    import torch

    from augment.preprocess import Preprocess
    from models.bundle import BundleInfo, Golden, save_bundle
    from models.classifier import Classifier, probabilities
    from models.networks import build

    torch.manual_seed(0)
    preprocess = Preprocess(224, 224)
    classifier = Classifier(build(network, 100, image_size=(224, 224)), mean=preprocess.mean, std=preprocess.std).eval()
    chosen = [picture.read_bytes() for picture in pictures[:8]]
    images = torch.from_numpy(np.stack([preprocess(data) for data in chosen])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        answers = probabilities(classifier(images), task="multiclass").tolist()
    goldens = [
        Golden(f"{i:02}.jpg", data, tuple(row)) for i, (data, row) in enumerate(zip(chosen, answers, strict=True))
    ]
    info = BundleInfo(
        name=network, task="multiclass", labels=tuple(f"class {i}" for i in range(100)), created="2026-01-01T00:00:00+00:00",
        network={"name": network, "image_size": [224, 224], "args": {}}, preprocess=preprocess.to_dict(),
    )  # fmt: skip
    return save_bundle(path, info, classifier, goldens)


def measured(bundle: Path, pictures: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Server → connections → what `benchmarks.load` prints, and the answers of all on the same pictures."""
    refract = [sys.executable, "-m", "refract", "serve", str(bundle), "--port", "PORT"]
    servers: dict[str, tuple[list[str], str, str]] = {
        "Refract": (refract, "/v1/predict?top=1", "raw"),
        "Refract, eager": ([*refract, "--backend", "eager"], "/v1/predict?top=1", "raw"),
        "plain FastAPI": (
            [sys.executable, "-m", "uvicorn", "benchmarks.servers.plain:app", "--port", "PORT"],
            "/predict",
            "multipart",
        ),
    }
    if importlib.util.find_spec("litserve"):
        servers["LitServe"] = ([sys.executable, "-m", "benchmarks.servers.lit", "PORT"], "/predict", "json")
    rows: dict[str, Any] = {}
    for name, (command, route, form) in servers.items():
        with serving(command, bundle) as url:
            loads = {}
            for connections in args.connections:
                options = ["--connections", str(connections), "--seconds", str(args.seconds), "--form", form]
                run = [sys.executable, "-m", "benchmarks.load", url + route, *map(str, pictures), *options]
                loads[str(connections)] = json.loads(
                    subprocess.run(run, capture_output=True, text=True, check=True).stdout
                )
                print(
                    f"{bundle.name:<10} {name:<15} {connections:>3} connections  {loads[str(connections)]}", flush=True
                )
            labels = [answered(url + route, picture, form) for picture in pictures[:20]]
        rows[name] = {"loads": loads, "labels": labels}
    wanted = rows["Refract"]["labels"]
    for row in rows.values():
        row["same_answers_of_20"] = sum(a == b for a, b in zip(row.pop("labels"), wanted, strict=True))
    return rows


@contextmanager
def serving(command: list[str], bundle: Path) -> Iterator[str]:
    """The address of a server that answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {**os.environ, "REFRACT_BENCH_BUNDLE": str(bundle)}
    arguments = [part.replace("PORT", str(port)) for part in command]
    with subprocess.Popen(arguments, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(url + ("/health" if "lit" in command[2] else "/readyz"), timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def answered(url: str, picture: Path, form: str) -> str:
    """The label that a server gives a picture."""
    data, kind = picture.read_bytes(), "image/jpeg"
    if form == "json":
        data, kind = json.dumps({"image": base64.b64encode(data).decode()}).encode(), "application/json"
    elif form == "multipart":
        kind = "multipart/form-data; boundary=b"
        data = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n' + data + b"\r\n--b--\r\n"
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        content = json.loads(answer.read())
    return str(content["predictions"][0]["label"] if "predictions" in content else content["label"])


def held(network: str, rows: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """A line for each goal, and whether it is reached, at the load with the most connections."""
    busiest = max(rows["Refract"]["loads"], key=int)
    for peer, goal in GOALS.items():
        if peer in rows:
            own = rows["Refract, eager" if peer == "LitServe" else "Refract"]["loads"][busiest]["rate"]
            ratio = own / max(rows[peer]["loads"][busiest]["rate"], 1e-9)
            yield f"{network}, {busiest} connections: {ratio:.2f} × {peer} (goal {goal})", ratio >= goal


if __name__ == "__main__":
    sys.exit(main())
