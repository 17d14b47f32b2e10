"""`refract ops [NAME]`"""

import argparse
import dataclasses
import inspect
import json
import textwrap
from typing import Any

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract ops",
        description="List the augmentation ops for policies, or describe one with its parameters.",
    )
    parser.add_argument("name", nargs="?", help="op whose parameters are described (default: list all ops)")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    return console.run("ops", lambda: _ops(args), plugins=args.plugin)


def _ops(args: argparse.Namespace) -> int:
    from refract.augment.ops.base import nearest
    from refract.augment.ops.reader import PolicyError
    from refract.augment.registry import OPS

    if args.name is not None and args.name not in OPS:
        hint = nearest(args.name, OPS) or f"; ops: {', '.join(OPS)}"
        raise PolicyError(f"no op {args.name!r}{hint}")
    if output.is_json():
        for name in [args.name] if args.name else OPS:
            output.result(described(name))
    elif args.name:
        _show(described(args.name))
    else:
        kind = ""
        for row in sorted(map(described, OPS), key=lambda row: _KINDS.index(row["kind"])):
            if row["kind"] != kind:
                kind = row["kind"]
                print(f"{kind}")
            cpu = "  [cpu]" if row["cpu_only"] else ""
            print(f"  {row['name']:<20} {row['help']}{cpu}")
            print(
                textwrap.fill(
                    ", ".join(_parameter(*item) for item in row["parameters"].items()),
                    118,
                    initial_indent=" " * 23,
                    subsequent_indent=" " * 23,
                )
            )
        print(
            "\n[cpu]: the batch executor runs this op on the CPU. `refract ops NAME` describes an op with its units and ranges."
        )
    return 0


_KINDS = ("geometric", "color", "pixel", "region", "batch", "text", "composition")


def described(name: str) -> dict[str, Any]:
    """Describe an op as JSON values: name, kind, parameters → default or `required`, help, doc, cpu_only."""
    from refract.augment.ops.pixel import cpu_only
    from refract.augment.registry import OPS

    op = OPS[name]
    doc = inspect.cleandoc(op.__doc__ or "")
    return {
        "name": name,
        "kind": op.kind,
        "help": doc.splitlines()[0],
        "parameters": {item.name: _default(item) for item in dataclasses.fields(op)},
        "cpu_only": cpu_only(op),
        "doc": doc,
    }


def _default(item: dataclasses.Field) -> Any:
    if item.default is not dataclasses.MISSING:
        return list(item.default) if isinstance(item.default, tuple) else item.default
    return "required" if item.default_factory is dataclasses.MISSING else item.default_factory()


def _parameter(name: str, default: Any) -> str:
    return f"{name} (required)" if default == "required" else f"{name}={json.dumps(default)}"


def _show(row: dict[str, Any]) -> None:
    print(f"{row['name']} ({row['kind']})\n")
    print(textwrap.indent(row["doc"], "  "))
    print("\nparameters\n" + "\n".join(f"  {_parameter(*item)}" for item in row["parameters"].items()))
    required = {key: "…" for key, default in row["parameters"].items() if default == "required"}
    example = ", ".join(f"{key}: {value}" for key, value in {**required, "p": row["parameters"]["p"]}.items())
    print(f"\nin a policy\n  - {row['name']}: {{{example}}}")
