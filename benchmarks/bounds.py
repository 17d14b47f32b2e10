"""Test a server at ten times its capacity, through 1,000 hot swaps of its model, and for an hour of images. Exit code 1 if a test fails.

python -m benchmarks.bounds overload --images PHOTOS --json benchmarks/results/overload.json
python -m benchmarks.bounds swaps    --images PHOTOS --json benchmarks/results/swaps.json
python -m benchmarks.bounds soak     --images PHOTOS --json benchmarks/results/soak.json
"""

import argparse
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlparse

from benchmarks.report import environment, write
from benchmarks.serve import OWN, load
from benchmarks.servers.start import make_bundle, resident_mib, serving

DEADLINE_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photos")
    parser.add_argument("--seconds", type=float, help="duration (default: 60 for overload, 3600 for soak)")
    parser.add_argument("--count", type=int, default=1000, help="number of hot swaps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:60]
    with tempfile.TemporaryDirectory() as folder:
        measurements = TRIALS[args.trial](files, Path(folder), args)
    result = {"environment": environment("torch", "fastapi", "uvicorn"), **measurements}
    print(json.dumps(result, indent=1))
    if args.json:
        write(args.json, result)
    return 0 if result["holds"] else 1


def overload(files: list[Path], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Send resnet18 in plain float32 ten times the requests that it can process."""
    bundle = make_bundle("resnet18", [file.read_bytes() for file in files], folder / "m")
    with serving([*OWN, "--backend", "eager"], bundle) as (url, process):
        address = url + "/v1/predict?top=1"
        capacity = load(address, files, "raw", 16, 10)["rate"]
        resident, seconds = [], args.seconds or 60
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load, address, files, "raw", 1024, seconds, rate=10 * capacity)
            while not loading.done():
                resident.append(resident_mib(process.pid))
                time.sleep(seconds / 12)
            under = loading.result()
        began = time.perf_counter()
        times = []
        while time.perf_counter() - began < 5:
            asked = time.perf_counter()
            assert one(url, files[0].read_bytes())[0] == 200
            times.append(time.perf_counter() - asked)
        again = load(address, files, "raw", 16, 10)["rate"]
    recovered = next((sum(times[: k + 1]) for k, seconds in enumerate(times) if seconds < 0.2), 99.0)
    good = set(under["statuses"]) <= {"200", "429"} and under["p99_of_sent"] <= 1000 * DEADLINE_S and recovered <= 1
    return {
        "capacity": capacity,
        "offered": round(10 * capacity),
        "under": under,
        "resident_mib": resident,
        "seconds_until_a_request_takes_under_0.2_s": round(recovered, 2),
        "rate_afterwards": again,
        "holds": good and resident[-1] / resident[len(resident) // 2] < 1.05 and again > 0.8 * capacity,
    }


def swaps(files: list[Path], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Swap lenet5 under the load of four connections, and compare every response with the predictions of the model that it names."""
    from refract.models.bundle.bundle import load_bundle
    from refract.serve.runtime.engine import Engine

    data = [file.read_bytes() for file in files[:8]]
    one_bundle = make_bundle("lenet5", data, folder / "a", size=32)
    other_bundle = make_bundle("lenet5", data, folder / "b", size=32, seed=1)
    wanted: dict[str, list[float]] = {}
    for path in (one_bundle, other_bundle):
        engine = Engine(load_bundle(path))
        wanted[engine.bundle.digest] = [float(engine.predict(engine.preprocess(item)[None]).max()) for item in data]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "benchmarks.servers.swapping",
        str(one_bundle),
        str(other_bundle),
        str(port),
        str(args.count),
    ]
    counts: Counter[str] = Counter()
    ended = threading.Event()

    def ask(number: int) -> None:
        k = number
        while not ended.is_set():
            status, answer = one(f"http://127.0.0.1:{port}", data[k % len(data)])
            if status != 200:
                counts[f"status {status}"] += 1
            else:
                response = json.loads(answer)
                digest, confidence = response["model"]["digest"], response["predictions"][0]["confidence"]
                right = abs(confidence - wanted[digest][k % len(data)]) < 1e-4
                counts[f"{digest[:8]} {'right' if right else 'WRONG'}"] += 1
            k += 1

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before, began = resident_mib(process.pid), time.perf_counter()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        done, inference_threads = map(int, process.stdout.readline().split())
        seconds = time.perf_counter() - began
        ended.set()
        for thread in threads:
            thread.join()
        after = resident_mib(process.pid)
        process.terminate()
    good = all(" right" in key for key in counts) and len(counts) == 2 and done == args.count and inference_threads <= 2
    return {
        "swaps": done,
        "seconds": round(seconds, 1),
        "answers": dict(counts),
        "inference_threads_at_the_end": inference_threads,
        "resident_mib": {"before": before, "after": after},
        "holds": good,
    }


def soak(files: list[Path], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Send lenet5 40 images per second, every tenth damaged, and measure the growth of the memory after the first tenth of the time."""
    bundle = make_bundle("lenet5", [file.read_bytes() for file in files[:4]], folder / "m", size=32)
    damaged = folder / "damaged"
    damaged.mkdir()
    for number, file in enumerate(files[:6]):
        data = file.read_bytes()
        (damaged / f"{number}.jpg").write_bytes(data[: len(data) * (number + 1) // 8])
    mixed = [*files[:54], *sorted(damaged.iterdir())]
    total = args.seconds or 3600
    resident, loads = [], []
    with serving([*OWN, "--backend", "eager"], bundle) as (url, process):
        for _ in range(20):
            loads.append(load(url + "/v1/predict?top=1", mixed, "raw", 8, total / 20, rate=40))
            resident.append(resident_mib(process.pid))
            print(resident[-1], loads[-1], flush=True)
    growth = resident[-1] / resident[1] - 1
    statuses: Counter[str] = Counter()
    for row in loads:
        statuses.update(row["statuses"])
    return {
        "seconds": total,
        "resident_mib": resident,
        "growth": round(growth, 4),
        "p99_ms": [row["p99"] for row in loads],
        "statuses": dict(statuses),
        "holds": growth < 0.02 and set(statuses) <= {"200", "400"},
    }


def one(url: str, data: bytes) -> tuple[int, bytes]:
    """Return (status, body) of a request on a separate connection."""
    parsed = urlparse(url)
    connection = http.client.HTTPConnection(parsed.hostname or "", parsed.port, timeout=DEADLINE_S + 5)
    try:
        connection.request("POST", "/v1/predict?top=1", data, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


TRIALS = MappingProxyType({"overload": overload, "swaps": swaps, "soak": soak})

if __name__ == "__main__":
    sys.exit(main())
