"""Send HTTP requests from this process. Each connection sends its next image after the response to the previous one.

    python -m benchmarks.load URL IMAGES… --connections 16 --seconds 10

Prints one line of JSON: requests per second, latencies in milliseconds, and the number of responses by status. With --rate, one latency
counts from the time when a request was due, although its connection may still have been busy, and the other from the time when it was
sent. The program uses plain sockets without an HTTP library, so that it takes little of the cores that it shares with the server.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="URL of the route that accepts an image")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds before the measurement starts")
    parser.add_argument(
        "--form",
        choices=("raw", "json", "multipart", "mlflow"),
        default="raw",
        help="json: LitServe's {image: base64}; mlflow: {inputs: [base64]}",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=0,
        help="requests per second, sent evenly without waiting for responses; 0: as fast as the responses arrive",
    )
    args = parser.parse_args()
    print(json.dumps(asyncio.run(load(args))))


async def load(args: argparse.Namespace) -> dict[str, object]:
    """What `main` prints."""
    parsed = urlparse(args.url)
    path = parsed.path + (f"?{parsed.query}" if parsed.query else "")
    requests = [_request(path, parsed.netloc, file.read_bytes(), args.form) for file in args.images]
    begin = time.perf_counter() + args.warmup
    end = begin + args.seconds
    responses: list[tuple[float, float, float, int]] = []

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection(parsed.hostname, parsed.port)
        place, started = number, time.perf_counter()
        while (sent := time.perf_counter()) < end:
            due = sent
            if args.rate:
                due = started + place / args.rate
                await asyncio.sleep(max(0, due - time.perf_counter()))
                sent = time.perf_counter()
            writer.write(requests[place % len(requests)])
            status = await _answered(reader)
            responses.append((due, sent, time.perf_counter(), status))
            place += args.connections
        writer.close()

    await asyncio.gather(*(one(number) for number in range(args.connections)))
    counted = [row for row in responses if begin <= row[1] and row[2] <= end]
    times = 1000 * np.array([until - due for due, _, until, status in counted if status == 200] or [np.nan])
    after = 1000 * np.array([until - sent for _, sent, until, status in counted if status == 200] or [np.nan])
    return {
        "rate": round(sum(row[3] == 200 for row in counted) / args.seconds, 1),
        "p50": round(float(np.percentile(times, 50)), 2),
        "p99": round(float(np.percentile(times, 99)), 2),
        "p99_of_sent": round(float(np.percentile(after, 99)), 2),
        "statuses": dict(Counter(str(row[3]) for row in counted)),
    }


def _request(path: str, host: str, image: bytes, form: str) -> bytes:
    import base64

    kind, body = "image/jpeg", image
    if form == "mlflow":
        kind, body = "application/json", json.dumps({"inputs": [base64.b64encode(image).decode()]}).encode()
    elif form == "json":
        kind, body = "application/json", json.dumps({"image": base64.b64encode(image).decode()}).encode()
    elif form == "multipart":
        kind = "multipart/form-data; boundary=b"
        body = (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n' + image + b"\r\n--b--\r\n"
        )
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _answered(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    if lengths:
        await reader.readexactly(int(lengths[0].split(b":")[1]))
    else:  # chunked
        while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
            await reader.readexactly(size + 2)
        await reader.readuntil(b"\r\n")
    return status


if __name__ == "__main__":
    main()
