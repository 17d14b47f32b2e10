"""The options of `refract serve`. Imports nothing heavy: --help and a mistyped option are answered at once."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

BACKENDS = (
    "auto", "eager", "bf16", "fp16", "compiled", "cuda-graphs", "tensorrt",
    "openvino", "openvino-bf16", "openvino-int8", "onnx", "onnx-int8", "int8",
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """SystemExit 2, with the option named, for what cannot be."""
    parser = _parser()
    found = parser.parse_args(argv)
    if found.rate is not None and found.keys is None:
        parser.error("--rate is for each key: it needs --keys")
    if (found.challenger is not None) != ((found.shadow is None) != (found.canary is None)):
        parser.error("--challenger SOURCE goes with one of --shadow SHARE and --canary SHARE")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refract serve",
        usage="refract serve SOURCE [--option VALUE …]; --help tells them",
        description="Serve a bundle over HTTP: POST images to /v1/predict; see /docs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_whole(0, 65535), default=8000, help="port to listen on; 0 takes a free one")
    add(
        "--device",
        default="auto",
        help="where the network runs: cpu, cuda, several as cuda:0,cuda:1, or all GPUs by all",
    )
    add(
        "--replicas",
        type=_whole(1, 256),
        default=1,
        metavar="N",
        help="engines on each device; on a CPU they share its cores",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what computes the network; auto times what is installed, but in 8 bits, and takes the fastest that agrees with float32; "
        "int8 takes the faster of those in 8 bits",
    )
    add("--max-batch", type=_whole(1, 65536), default=32, metavar="N", help="images in one batch")
    add("--max-wait-ms", type=_number(0, 1e5), default=2.0, metavar="MS", help="longest wait for a batch to fill")
    add(
        "--poll-s",
        type=_number(0, 1e5),
        default=60.0,
        metavar="S",
        help="how often to ask what models:/NAME@ALIAS means; 0 never",
    )
    add("--challenger", metavar="SOURCE", help="a second model, as SOURCE")
    add(
        "--shadow",
        type=_number(0, 1, above=True),
        metavar="SHARE",
        help="of the requests, of which it is asked as well; its agreement is counted",
    )
    add("--canary", type=_number(0, 1, above=True), metavar="SHARE", help="of the requests, which it answers")
    add("--max-requests", type=_whole(1, 65536), default=256, metavar="N", help="requests at a time; more get 429")
    add(
        "--deadline-s",
        type=_number(0, 1e5, above=True),
        default=10.0,
        metavar="S",
        help="for an answer; what takes longer is dropped",
    )
    add(
        "--drain-s",
        type=_number(0, 1e5),
        default=0.0,
        metavar="S",
        help="after SIGTERM in which all is answered still, but /readyz says 503, for balancers to notice",
    )
    # Of nginx and AWS, 60 s: whoever is in front is to close first, as what it sends just when we do is lost.
    add(
        "--keep-alive-s",
        type=_whole(1, 86400),
        default=75,
        metavar="S",
        help="that a connection is kept on which nothing is asked; more than the balancer in front of it keeps one",
    )
    add("--keys", type=Path, metavar="FILE", help="API keys, one a line; read again when the file changes")
    add("--admin-keys", type=Path, metavar="FILE", help="keys for /admin/rollback, in place of those of --keys")
    add("--rate", type=_number(0, 1e5, above=True), metavar="N", help="requests a second of each key; more get 429")
    add(
        "--cors-origin",
        type=_origin,
        nargs="+",
        action="extend",
        default=[],
        metavar="ORIGIN",
        help="origins whose pages may read answers, as https://app.example; * for all",
    )
    add(
        "--root-path",
        type=_prefix,
        default="",
        metavar="PREFIX",
        help="path of a reverse proxy below which the server is, as /models; the proxy may keep or remove it",
    )
    add("--metrics-port", type=_whole(0, 65535), metavar="PORT", help="answer Prometheus at /metrics there")
    add("--traces", metavar="URL", help="of an OpenTelemetry collector, as http://localhost:4318/v1/traces")
    add(
        "--sample",
        type=Path,
        metavar="DIR",
        help="keep a sample of what is asked there, for `refract drift` and for labelling",
    )
    add(
        "--sample-share",
        type=_number(0, 1, above=True),
        default=0.01,
        metavar="SHARE",
        help="of the images, whose numbers are kept",
    )
    add(
        "--sample-mb", type=_number(1, 1e7), default=100.0, metavar="MB", help="most that is kept; the oldest gives way"
    )
    add(
        "--sample-below",
        type=_number(0, 1),
        default=0.5,
        metavar="CONFIDENCE",
        help="of those drawn, under which the image itself is kept; 0 keeps none",
    )
    add("--access-log", action="store_true", help="write a line of JSON for each request to the standard output")
    add(
        "--max-body-mb",
        type=_number(0.001, 1e5),
        default=20.0,
        metavar="MB",
        help="largest request body, in MiB",
    )
    add("--max-pixels", type=_whole(1, 2**31), default=50_000_000, metavar="N", help="most pixels of one image")
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in {low} … {high}")
        return int(text)

    return parse


def _origin(text: str) -> str:
    from refract.serve.http.cors import is_origin

    if not is_origin(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an origin as https://app.example or http://localhost:3000, in lower case and without a path, nor *"
        )
    return text


def _prefix(text: str) -> str:
    from refract.serve.http.base_path import prefix_problem

    if text and (problem := prefix_problem(text)):
        raise argparse.ArgumentTypeError(problem)
    return text


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """above: `low` itself is refused."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number {'above' if above else 'from'} {low:g} to {high:g}"
            )
        return value

    return parse
