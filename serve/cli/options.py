"""The options of `refract serve`. The module imports nothing heavy, so that --help and usage errors respond at once."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Exits with 2 and a message that names the invalid option."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.rate is not None and arguments.keys is None:
        parser.error("--rate limits each API key: it needs --keys FILE")
    if (arguments.shadow is not None) + (arguments.canary is not None) != (arguments.challenger is not None):
        parser.error("--challenger SOURCE needs exactly one of --shadow SHARE and --canary SHARE")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refract serve",
        usage="refract serve SOURCE [--option VALUE …]; --help lists the options",
        description="Serve a bundle over HTTP. Clients POST images to /v1/predict; /docs describes the API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the folder of a bundle, models:/NAME@ALIAS or models:/NAME/VERSION")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_whole(0, 65535), default=8000, help="port to listen on; 0 selects a free one")
    add(
        "--device",
        default="auto",
        help="where the network runs: auto, cpu, cuda, a list such as cuda:0,cuda:1, or all for every GPU",
    )
    add(
        "--replicas",
        type=_whole(1, 256),
        default=1,
        metavar="N",
        help="engines per device; on a CPU they share its cores",
    )
    add(
        "--backend",
        metavar="NAME",
        default="auto",
        help="runtime of the network, such as eager, bf16, openvino or onnx (docs/serving.md lists all); auto times the installed "
        "backends, except 8-bit ones, and selects the fastest that agrees with float32; int8 selects the faster of the 8-bit backends",
    )
    add(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="load this plugin, a Python file or module, for its networks and backends (docs/plugins.md); may be repeated",
    )
    add("--max-batch", type=_whole(1, 65536), default=32, metavar="N", help="most images in one batch")
    add("--max-wait-ms", type=_number(0, 1e5), default=2.0, metavar="MS", help="longest wait for a batch to fill")
    add(
        "--poll-s",
        type=_number(0, 1e5),
        default=60.0,
        metavar="S",
        help="seconds between two checks of models:/NAME@ALIAS for a new version; 0 disables them",
    )
    add("--challenger", metavar="SOURCE", help="a second model to compare with the first, in the same forms as SOURCE")
    add(
        "--shadow",
        type=_number(0, 1, above=True),
        metavar="SHARE",
        help="fraction of the requests that the challenger also predicts; metrics count its agreement",
    )
    add(
        "--canary",
        type=_number(0, 1, above=True),
        metavar="SHARE",
        help="fraction of the requests that the challenger answers in place of the first model",
    )
    add(
        "--max-requests",
        type=_whole(1, 65536),
        default=256,
        metavar="N",
        help="most requests in flight; further ones receive 429",
    )
    add(
        "--deadline-s",
        type=_number(0, 1e5, above=True),
        default=10.0,
        metavar="S",
        help="longest time to answer a request, in seconds; slower ones receive 504",
    )
    add(
        "--drain-s",
        type=_number(0, 1e5),
        default=0.0,
        metavar="S",
        help="seconds after SIGTERM in which requests are still served and /readyz returns 503, so that load balancers notice",
    )
    # Longer than the 60 s of nginx and AWS: the proxy must close first, as a request that meets our close is lost.
    add(
        "--keep-alive-s",
        type=_whole(1, 86400),
        default=75,
        metavar="S",
        help="seconds that an idle connection stays open; more than the idle timeout of the load balancer in front",
    )
    add(
        "--keys",
        type=Path,
        metavar="FILE",
        help="require an API key of this file, one per line; reread when it changes",
    )
    add("--admin-keys", type=Path, metavar="FILE", help="API keys for /admin/rollback, in place of those of --keys")
    add(
        "--rate",
        type=_number(0, 1e5, above=True),
        metavar="N",
        help="most requests per second of each API key; further ones receive 429",
    )
    add(
        "--cors-origin",
        type=_origin,
        nargs="+",
        action="extend",
        default=[],
        metavar="ORIGIN",
        help="origins whose web pages may read responses, such as https://app.example; * for all",
    )
    add(
        "--root-path",
        type=_prefix,
        default="",
        metavar="PREFIX",
        help="path of a reverse proxy below which the server runs, such as /models; the proxy may keep or remove it",
    )
    add(
        "--metrics-port",
        type=_whole(0, 65535),
        metavar="PORT",
        help="serve Prometheus metrics at /metrics on this port; 0 selects a free one",
    )
    add(
        "--traces",
        metavar="URL",
        help="send traces to this OpenTelemetry collector, such as http://localhost:4318/v1/traces",
    )
    add(
        "--sample",
        type=Path,
        metavar="DIR",
        help="store a sample of the requests in this folder, for `refract drift` and for labelling",
    )
    add(
        "--sample-share",
        type=_number(0, 1, above=True),
        default=0.01,
        metavar="SHARE",
        help="fraction of the images that are sampled; their statistics and predictions are stored",
    )
    add(
        "--sample-mb",
        type=_number(1, 1e7),
        default=100.0,
        metavar="MB",
        help="disk quota of the sample, in MiB; the oldest files are deleted first",
    )
    add(
        "--sample-below",
        type=_number(0, 1),
        default=0.5,
        metavar="CONFIDENCE",
        help="store the image file of a sampled image whose confidence is lower; 0 stores none",
    )
    add("--access-log", action="store_true", help="write one JSON line per request to the standard output")
    add(
        "--max-body-mb",
        type=_number(0.001, 1e5),
        default=20.0,
        metavar="MB",
        help="largest request body, in MiB",
    )
    add("--max-pixels", type=_whole(1, 2**31), default=50_000_000, metavar="N", help="largest image, in pixels")
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
            f"{text!r} is not an origin such as https://app.example, in lower case and without a path; * allows all"
        )
    return text


def _prefix(text: str) -> str:
    from refract.serve.http.base_path import prefix_problem

    if text and (problem := prefix_problem(text)):
        raise argparse.ArgumentTypeError(problem)
    return text


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Return a parser of numbers in [low, high], or in (low, high] if `above`."""

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
