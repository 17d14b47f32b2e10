"""`python docs/make_reference.py [--check]`: write the pages of docs/reference/ that follow from the code.

These are the command line, the config keys, the ops, the HTTP API and the metrics of the server. With --check, it writes nothing, lists the
pages that differ from the code, and ends with exit code 1 if there are any.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refract import cli

FOLDER = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/make_reference.py; do not edit. -->"


def command_line() -> str:
    """The page of the commands: the `--help` of each. The config keys in the help of `train` have a separate page."""
    lines = [
        "Every command and its options, as `refract COMMAND --help` prints them. `refract --version` prints the version."
    ]
    for heading, commands in cli.GROUPS.items():
        lines += ["", f"## {heading}"]
        for name in commands:
            for given in ([name], [name, "--url", "URL"]) if name == "predict" else ([name],):
                text, _, keys = _output([*given, "--help"]).partition("Keys, with their defaults:")
                lines += ["", f"### refract {' '.join(given)}", "", "```text", text.strip(), "```"]
                if keys:
                    lines += ["", "All keys are in [Configuration](config.md)."]
    return _page("Command line", lines)


def configuration() -> str:
    """The page of the config: the keys of each section, from `refract config schema`."""
    schema = json.loads(_output(["config", "schema"]))
    lines = [
        "Every key of a config file, with its type, default and meaning. The meaning states the range of a number.",
        "The command line accepts each key as `--section.key VALUE`, and a mapping as YAML: `--model.args '{depth: 2}'`.",
        "`refract config schema` prints the same as a JSON Schema for editors.",
    ]
    for section, link in schema["properties"].items():
        if "$ref" not in link:  # a key outside the sections
            lines += ["", f"## {section}", "", f"{link.get('description', '')} Type: {_type(link)}.".strip()]
            continue
        part = schema["$defs"][link["$ref"].rpartition("/")[2]]
        lines += [
            "",
            f"## {section}",
            "",
            part["description"],
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key, value in part["properties"].items():
            if not value.get("deprecated"):
                default = _cell(_code(value.get("default", {})))
                lines.append(f"| `{key}` | {_cell(_type(value))} | {default} | {_cell(value['description'])} |")
    return _page("Configuration", lines)


def ops() -> str:
    """The page of the ops: parameters and description of each, from `refract ops --json`."""
    rows = [json.loads(line) for line in _output(["ops", "--json"]).splitlines()]
    lines = [
        "Every op of a policy, with its parameters and their defaults. [Policies](../augment.md) explains how ops are combined.",
        "`p` is the probability that an op applies. A parameter with two numbers is drawn from that range.",
        "An op marked *CPU* runs on the CPU, also in the batch executor.",
    ]
    for kind, heading in KINDS.items():
        lines += ["", f"## {heading}"]
        if (FOLDER.parent / "gallery" / f"{kind}.jpg").is_file():
            lines += ["", f"![Three draws of each op]({f'../gallery/{kind}.jpg'})"]
        for row in rows:
            if row["kind"] == kind:
                lines += [
                    "",
                    f"### `{row['name']}`",
                    "",
                    _prose(row["doc"]) + (" *CPU*" if row["cpu_only"] else ""),
                    "",
                ]
                lines += [f"- `{name}`: {_default(default)}" for name, default in row["parameters"].items()]
    return _page("Ops", lines)


KINDS: Mapping[str, str] = MappingProxyType(
    {
        "geometric": "Geometric ops",
        "color": "Colour ops",
        "pixel": "Pixel ops",
        "region": "Region ops",
        "batch": "Batch ops",
        "text": "Text ops",
        "composition": "Composition ops and published policies",
    }
)
"""Kind of an op → heading."""


def http_api() -> str:
    """The page of the HTTP API, from the server's own OpenAPI document."""
    lines = [
        "Every path of the server. A server shows the same at `/docs`, and has it as OpenAPI at `/openapi.json`.",
        "[Serving](../serving.md) explains requests and limits; its [table of errors](../serving.md#errors) lists the problem codes.",
    ]
    document = _app().openapi()
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            lines += ["", f"## {method.upper()} {path}", "", _prose(route.get("description") or route["summary"])]
            if parameters := route.get("parameters"):
                lines += ["", "| parameter | in | type | meaning |", "|---|---|---|---|"]
                lines += [_parameter(parameter) for parameter in parameters]
            if body := route.get("requestBody"):
                kinds = ", ".join(f"`{kind}`" for kind in body["content"])
                lines += ["", f"**Body** ({kinds}). {body.get('description', '')}".rstrip()]
            lines += ["", "| status | meaning |", "|---|---|"]
            lines += [
                f"| {status} | {_cell(response['description'])} |" for status, response in route["responses"].items()
            ]
    return _page("HTTP API", lines)


def metrics() -> str:
    """The page of the Prometheus metrics, from the registry of a server."""
    lines = [
        "`refract serve … --metrics-port PORT` serves these metrics at `/metrics`.",
        "[A Grafana dashboard](../../deploy/grafana.json) shows them.",
        "A histogram `X` has the series `X_bucket`, `X_sum` and `X_count`. The metrics of a GPU exist only with one.",
        "",
        "| metric | kind | labels | meaning |",
        "|---|---|---|---|",
    ]
    registry = _app().state.service.metrics.registry
    for collector in registry._collector_to_names:
        for metric in collector.describe() if hasattr(collector, "describe") else collector.collect():
            name = metric.name + ("_total" if metric.type == "counter" else "")
            names = getattr(metric, "_labelnames", None) or getattr(collector, "_labelnames", ())
            labels = ", ".join(f"`{label}`" for label in names)
            lines.append(f"| `{name}` | {metric.type} | {labels} | {_cell(metric.documentation)} |")
    return _page("Metrics of the server", lines)


PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"cli.md": command_line, "config.md": configuration, "ops.md": ops, "http.md": http_api, "metrics.md": metrics}
)
"""File in docs/reference/ → the function that writes its text."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the pages of docs/reference/ that follow from the code.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a page differs from the code"
    )
    check = parser.parse_args(arguments).check
    os.environ["COLUMNS"] = "100"
    stale = []
    for name, text in ((name, write()) for name, write in PAGES.items()):
        path = FOLDER / name
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, "utf-8")
    if check and stale:
        print(f"docs/reference: {', '.join(stale)} differ from the code; run python docs/make_reference.py")
        return 1
    print(f"docs/reference: wrote {', '.join(stale)}" if stale else "docs/reference: every page follows the code")
    return 0


def _page(title: str, lines: list[str]) -> str:
    return "\n".join([f"# {title}", "", NOTE, "", *lines]) + "\n"


def _output(arguments: list[str]) -> str:
    """The standard output of `refract …`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return out.getvalue()


def _app() -> Any:
    """The application that serves a small untrained network."""
    from refract.augment.preprocess import Preprocess
    from refract.models.bundle.bundle import BundleInfo, load_bundle, save_bundle
    from refract.models.classifier import Classifier
    from refract.models.registry import build
    from refract.serve.http.app import create_app
    from refract.serve.http.auth import ApiKeys

    preprocess = Preprocess(height=32, width=32)
    classifier = Classifier(build("lenet5", 2, image_size=(32, 32)), mean=preprocess.mean, std=preprocess.std).eval()
    info = BundleInfo(
        name="photos",
        task="binary",
        labels=("cat", "dog"),
        network={"name": "lenet5", "image_size": [32, 32], "args": {}},
        preprocess=preprocess.to_dict(),
        temperature=1.0,
        thresholds=(),
        metrics={},
        versions={},
        created="2025-01-01T00:00:00+00:00",
    )
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text("an-example-key\n", "utf-8")
        return create_app(load_bundle(save_bundle(Path(folder, "bundle"), info, classifier, [])), keys=ApiKeys(keys))


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON Schema as words: `number or null`, or the accepted values."""
    if "enum" in schema:
        return ", ".join(_code(value) for value in schema["enum"])
    if "const" in schema:
        return _code(schema["const"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"]))
    if schema.get("type") == "array":
        size = schema.get("maxItems")
        items = schema.get("items") or next(iter(schema.get("prefixItems", ())), {})
        return f"list of {f'{size} ' if size else ''}{_type(items)}s" if items.get("type") else "list"
    kind = schema.get("type", "any")
    if isinstance(kind, list):  # numbers such as 1e-3, which YAML reads as text
        kind = kind[0]
    return {"object": "mapping", "string": "text"}.get(kind, kind)


def _parameter(parameter: Mapping[str, Any]) -> str:
    schema = parameter["schema"]
    meaning = parameter.get("description", schema.get("description", ""))
    return f"| `{parameter['name']}` | {parameter['in']} | {_cell(_type(schema))} | {_cell(meaning)} |"


def _code(value: object) -> str:
    return f"`{value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)}`"


def _default(value: object) -> str:
    return "required" if value == "required" else _code(value)


def _prose(text: str) -> str:
    """A docstring as Markdown: `<` and `*` are literal."""
    return re.sub(r"(?<!`)([*<])", r"\\\1", text)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
