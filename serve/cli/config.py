"""The options of `refract serve`: name, type, default, range and help of each, in one place.

`refract.serve.cli.options` derives the command line, the keys of a YAML file and the environment variables from them. The module imports
nothing heavy, so that --help and usage errors respond at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from refract.serve.cli.values import integer, number, path_prefix, switch, web_origin
from refract.serve.requests.limits import MIB, Limits
from refract.serve.runtime.backends import NAMES
from refract.serve.runtime.settings import ServiceSettings


@dataclass(frozen=True)
class Option:
    """How an option is read and described. parse: reads one value from a text, or raises ValueError; many: takes several values."""

    help: str
    parse: Callable[[str], Any]
    metavar: str | None
    many: bool


def _option(
    help: str, parse: Callable[[str], Any] = str, metavar: str | None = None, *, many: bool = False
) -> dict[str, Any]:
    return {"option": Option(help, parse, metavar, many)}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The options of one server. ValueError if options contradict each other.

    origins: where options were set, if not on the command line: an environment variable, or a file and its key.
    """

    source: str = field(
        default="",
        metadata=_option("the folder of a bundle, models:/NAME@ALIAS or models:/NAME/VERSION", metavar="SOURCE"),
    )
    host: str = field(default="127.0.0.1", metadata=_option("address to listen on"))
    port: int = field(default=8000, metadata=_option("port to listen on; 0 selects a free one", integer(0, 65535)))
    grpc_port: int | None = field(
        default=None,
        metadata=_option(
            "also serve the Open Inference Protocol over gRPC on this port; 0 selects a free one",
            integer(0, 65535),
            "PORT",
        ),
    )
    device: str = field(
        default="auto",
        metadata=_option("where the network runs: auto, cpu, cuda, a list such as cuda:0,cuda:1, or all for every GPU"),
    )
    replicas: int = field(
        default=1, metadata=_option("engines per device; on a CPU they share its cores", integer(1, 256), "N")
    )
    backend: str = field(
        default="auto",
        metadata=_option(
            f"runtime of the network: {', '.join(NAMES)} or a plugin's; auto times the installed backends, except 8-bit ones, and "
            "selects the fastest that agrees with float32; int8 selects the faster of the 8-bit backends",
            metavar="NAME",
        ),
    )
    plugin: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "load these plugins, Python files or modules, for their networks and backends (docs/plugins.md)",
            metavar="FILE",
            many=True,
        ),
    )
    max_batch: int = field(
        default=ServiceSettings.max_batch, metadata=_option("most images in one batch", integer(1, 65536), "N")
    )
    max_wait_ms: float = field(
        default=ServiceSettings.max_wait_ms, metadata=_option("longest wait for a batch to fill", number(0, 1e5), "MS")
    )
    poll_s: float = field(
        default=60.0,
        metadata=_option(
            "seconds between two checks of models:/NAME@ALIAS for a new version; 0 disables them", number(0, 1e5), "S"
        ),
    )
    challenger: str | None = field(
        default=None,
        metadata=_option("a second model to compare with the first, in the same forms as SOURCE", metavar="SOURCE"),
    )
    shadow: float | None = field(
        default=None,
        metadata=_option(
            "fraction of the requests that the challenger also predicts; metrics count its agreement",
            number(0, 1, above=True),
            "FRACTION",
        ),
    )
    canary: float | None = field(
        default=None,
        metadata=_option(
            "fraction of the requests that the challenger answers in place of the first model",
            number(0, 1, above=True),
            "FRACTION",
        ),
    )
    max_requests: int = field(
        default=ServiceSettings.max_requests,
        metadata=_option("most requests in flight; further ones receive 429", integer(1, 65536), "N"),
    )
    deadline_s: float = field(
        default=ServiceSettings.deadline_s,
        metadata=_option(
            "longest time to answer a request, in seconds; slower ones receive 504", number(0, 1e5, above=True), "S"
        ),
    )
    min_familiarity: float | None = field(
        default=None,
        metadata=_option(
            "abstain if fewer than this fraction of the validation images are less familiar than the image; the bundle needs training "
            "features",
            number(0, 1),
            "FRACTION",
        ),
    )
    similar: bool = field(
        default=False,
        metadata=_option(
            "let clients see the training images that are most similar to theirs, with file names and thumbnails",
            switch,
        ),
    )
    drain_s: float = field(
        default=0.0,
        metadata=_option(
            "seconds after SIGTERM in which requests are still served and /readyz returns 503, so that load balancers notice",
            number(0, 1e5),
            "S",
        ),
    )
    # Longer than the 60 s of nginx and AWS: the proxy must close first, as a request that meets our close is lost.
    keep_alive_s: int = field(
        default=75,
        metadata=_option(
            "seconds that an idle connection stays open; more than the idle timeout of the load balancer in front",
            integer(1, 86400),
            "S",
        ),
    )
    keys: Path | None = field(
        default=None,
        metadata=_option("require an API key of this file, one per line; reread when it changes", Path, "FILE"),
    )
    admin_keys: Path | None = field(
        default=None, metadata=_option("API keys for /admin/rollback, in place of those of --keys", Path, "FILE")
    )
    rate: float | None = field(
        default=None,
        metadata=_option(
            "most requests per second of each API key; further ones receive 429", number(0, 1e5, above=True), "N"
        ),
    )
    cors_origin: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "origins whose web pages may read responses, such as https://app.example; * for all",
            web_origin,
            "ORIGIN",
            many=True,
        ),
    )
    root_path: str = field(
        default="",
        metadata=_option(
            "path of a reverse proxy below which the server runs, such as /models; the proxy may keep or remove it",
            path_prefix,
            "PREFIX",
        ),
    )
    metrics_port: int | None = field(
        default=None,
        metadata=_option(
            "serve Prometheus metrics at /metrics on this port; 0 selects a free one", integer(0, 65535), "PORT"
        ),
    )
    traces: str | None = field(
        default=None,
        metadata=_option(
            "send traces to this OpenTelemetry collector, such as http://localhost:4318/v1/traces", metavar="URL"
        ),
    )
    sample: Path | None = field(
        default=None,
        metadata=_option(
            "store a sample of the requests in this folder, for `refract drift` and for labelling", Path, "DIR"
        ),
    )
    sample_fraction: float = field(
        default=0.01,
        metadata=_option(
            "fraction of the images that are sampled; their statistics and predictions are stored",
            number(0, 1, above=True),
            "FRACTION",
        ),
    )
    sample_mb: float = field(
        default=100.0,
        metadata=_option("disk quota of the sample, in MiB; the oldest files are deleted first", number(1, 1e7), "MB"),
    )
    sample_below: float = field(
        default=0.5,
        metadata=_option(
            "store the image file of a sampled image whose confidence is lower; 0 stores none",
            number(0, 1),
            "CONFIDENCE",
        ),
    )
    feedback_keep: int = field(
        default=ServiceSettings.feedback_keep,
        metadata=_option(
            "most predictions that /v1/feedback can judge, the latest; 0 turns feedback off", integer(0, 1_000_000), "N"
        ),
    )
    feedback_hours: float = field(
        default=ServiceSettings.feedback_hours,
        metadata=_option("longest time that a prediction can be judged, in hours", number(0, 1e5, above=True), "H"),
    )
    feedback_dir: Path | None = field(
        default=None,
        metadata=_option("append the feedback of clients to JSON lines in this folder, for relabelling", Path, "DIR"),
    )
    cache_mb: float = field(
        default=ServiceSettings.cache_mb,
        metadata=_option("memory for the predictions of repeated requests, in MiB; 0 keeps none", number(0, 1e6), "MB"),
    )
    access_log: bool = field(
        default=False, metadata=_option("write one JSON line per request to the standard output", switch)
    )
    max_body_mb: float = field(
        default=Limits.max_body_bytes / MIB, metadata=_option("largest request body, in MiB", number(0.001, 1e5), "MB")
    )
    max_pixels: int = field(
        default=Limits.max_pixels, metadata=_option("largest image, in pixels", integer(1, 2**31), "N")
    )
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError(f"SOURCE is missing; expected {OPTIONS['source'].help}")
        if self.backend not in NAMES and not self.plugin:
            accepted = f"accepted are {', '.join(NAMES)}; a plugin's backend needs --plugin FILE"
            raise ValueError(f"{self.origin('backend')}: {self.backend!r} is unknown; {accepted}")
        if self.grpc_port and self.grpc_port == self.port:
            raise ValueError(
                f"{self.origin('grpc_port')}: {self.port} is also that of {self.origin('port')}; choose another port"
            )
        if self.rate is not None and self.keys is None:
            raise ValueError(f"{self.origin('rate')} limits each API key: it needs --keys FILE")
        if self.feedback_dir is not None and not self.feedback_keep:
            raise ValueError(
                f"{self.origin('feedback_dir')} needs predictions to judge: {self.origin('feedback_keep')} is 0"
            )
        if (self.shadow is not None) + (self.canary is not None) != (self.challenger is not None):
            names = [name for name in ("challenger", "shadow", "canary") if getattr(self, name) is not None]
            given = ", ".join(map(self.origin, names))
            raise ValueError(
                f"--challenger SOURCE needs exactly one of --shadow FRACTION and --canary FRACTION; given: {given}"
            )

    def origin(self, name: str) -> str:
        """Return where the option was set, for messages: `--max-batch`, `REFRACT_SERVE_MAX_BATCH`, or `serve.yaml: max_batch`."""
        return self.origins.get(name, f"--{name.replace('_', '-')}")


OPTIONS: Mapping[str, Option] = {
    item.name: item.metadata["option"] for item in fields(ServeConfig) if "option" in item.metadata
}
"""All options by name."""

DEFAULTS: Mapping[str, Any] = {item.name: item.default for item in fields(ServeConfig) if item.name in OPTIONS}
"""The default of each option."""
