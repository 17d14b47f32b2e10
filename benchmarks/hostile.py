"""Send untrusted requests to a server. No response may have a status of 500 or above, or come after its deadline.

The memory must not grow, and valid odd images must get the right predictions. Then schemathesis sends requests built from the server's
OpenAPI description. Exit code 1 if a check fails.

    python -m benchmarks.hostile --json benchmarks/results/hostile.json
"""

import argparse
import contextlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from benchmarks.corpus import cases
from benchmarks.corpus.case import PREDICT, Case, encoded
from benchmarks.corpus.valid import odd_but_valid
from benchmarks.report import environment, write
from benchmarks.servers.start import make_bundle, resident_mib, serving

DEADLINE_S = 10.0
CLIENTS = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=4, help="rounds of the whole corpus; the growth is from the second to the last"
    )
    parser.add_argument("--examples", type=int, default=300, help="examples of schemathesis for each route")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    corpus = [*cases(), *odd_but_valid(np.random.default_rng(1))]
    command = [sys.executable, "-m", "refract", "serve", "BUNDLE", "--port", "PORT", "--backend", "eager"]
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(
            "lenet5",
            [encoded(case.label_of, "PNG") for case in corpus if case.label_of is not None][:8],
            Path(folder) / "m",
            size=32,
        )
        with serving(command, bundle) as (url, process):
            faults, resident, counts = [], [resident_mib(process.pid)], Counter[str]()
            for _ in range(args.rounds):
                with ThreadPoolExecutor(CLIENTS) as pool:
                    for case, (status, seconds, fault) in zip(
                        corpus, pool.map(lambda case: tried(url, case), corpus), strict=True
                    ):
                        counts[str(status)] += 1
                        faults += [f"{case.name}: {fault}"] if fault else []
                        faults += [f"{case.name}: took {seconds:.1f} s"] if seconds > DEADLINE_S + 2 else []
                resident.append(resident_mib(process.pid))
                print(f"{len(corpus)} requests, {len(faults)} faults, {resident[-1]} MiB", flush=True)
            fuzzed = fuzz(url, args.examples)
            resident.append(resident_mib(process.pid))
            alive = process.poll() is None
    growth = resident[args.rounds] / resident[min(2, args.rounds)] - 1
    result: dict[str, Any] = {
        "environment": environment("torch", "fastapi", "pillow", "simplejpeg", "schemathesis"),
        "cases": len(corpus),
        "rounds": args.rounds,
        "statuses": dict(sorted(counts.items())),
        "faults": faults[:50],
        "resident_mib": resident,
        "growth": round(growth, 3),
        "schemathesis": fuzzed,
        "holds": alive and not faults and growth < 0.05 and fuzzed["exit_code"] == 0,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        write(args.json, result)
    return 0 if result["holds"] else 1


def tried(url: str, case: Case, model: str = "lenet5") -> tuple[int, float, str]:
    """Send a case. Returns (status, seconds, description of the failure)."""
    began = time.perf_counter()
    path = case.path.replace("MODEL", model)
    status, answer = asked(url, path, case.body, case.kind, case.headers)
    seconds = time.perf_counter() - began
    if status >= 500 or status == 0:
        return status, seconds, f"{status} {answer[:200]!r}"
    if case.statuses is not None and status not in case.statuses:
        return status, seconds, f"{status} instead of {case.statuses}: {answer[:200]!r}"
    if status >= 400 and status != 400 and b'"code"' not in answer:
        return status, seconds, f"no problem details: {answer[:200]!r}"
    if case.label_of is not None:
        return status, seconds, compared(url, case, answer)
    return status, seconds, ""


def compared(url: str, case: Case, answer: bytes) -> str:
    """Describe the difference from the prediction for the same pixels in a plain PNG."""
    assert case.label_of is not None
    wanted = json.loads(asked(url, f"{PREDICT}?top=10", encoded(case.label_of, "PNG"), "image/png", {})[1])[
        "predictions"
    ][0]
    prediction = json.loads(answer)["predictions"][0]
    gap = abs(
        prediction["confidence"]
        - next((row["confidence"] for row in wanted["top"] if row["label"] == prediction["label"]), 0)
    )
    if gap > case.gap or wanted["confidence"] - prediction["confidence"] > case.gap:
        return (
            f"answered {prediction['label']} {prediction['confidence']:.3f}, "
            f"the plain image {wanted['label']} {wanted['confidence']:.3f}"
        )
    return ""


def asked(url: str, path: str, body: bytes, kind: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Return (status, body), with status 0 without a response. Each request has its own connection, which the server may close."""
    parsed = urlparse(url)
    connection = http.client.HTTPConnection(parsed.hostname or "", parsed.port, timeout=DEADLINE_S + 30)
    try:
        connection.putrequest("POST", path.replace(" ", "%20"), skip_accept_encoding=True)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            if value or name != "Content-Type":
                connection.putheader(name, value.encode("latin-1", "replace"))
        connection.endheaders()
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # rejected before all of it was sent; the response may have arrived
            connection.send(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (ConnectionResetError, http.client.BadStatusLine) as err:
        # Closed with the body unread: a server that rejects a body does this, and the client may lose the response.
        return (413, b'"code"') if len(body) > 2**20 else (0, repr(err).encode())
    except (OSError, http.client.HTTPException) as err:
        return 0, repr(err).encode()
    finally:
        connection.close()


def fuzz(url: str, examples: int) -> dict[str, Any]:
    """Return the findings of schemathesis: responses of 500 and above, and responses that do not match the OpenAPI description."""
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{url}/openapi.json",
        "--max-examples",
        str(examples),
        "--seed",
        "1",
        "--no-color",
    ]
    command += [
        "--checks",
        "not_a_server_error,content_type_conformance,status_code_conformance",
        "--request-timeout",
        str(DEADLINE_S + 5),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    tail = done.stdout.strip().splitlines()
    cases_run = re.findall(r"(\d+) (?:generated|passed|failed)", done.stdout)
    return {"exit_code": done.returncode, "counts": cases_run, "tail": [] if done.returncode == 0 else tail[-60:]}


if __name__ == "__main__":
    sys.exit(main())
