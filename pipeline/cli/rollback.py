"""`refract rollback NAME`"""

import argparse

from refract import output
from refract.pipeline import console
from refract.pipeline.cli.promote import client_at, try_to_load, uri_option


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract rollback",
        description="Restore the previous champion if its bundle loads: swap the aliases champion and previous.",
    )
    parser.add_argument("name", help="registered model")
    uri_option(parser)
    args = parser.parse_args(argv)
    return console.run("rollback", lambda: _rollback(args))


def _rollback(args: argparse.Namespace) -> int:
    from refract.pipeline.tracking.aliases import rollback, way_back

    client = client_at(args.uri)
    expected = way_back(client, args.name)
    try_to_load(client, args.name, expected[1])
    restored, replaced = rollback(client, args.name, expected=expected)
    output.result({"model": args.name, "champion": restored, "before": replaced})
    print(f"models:/{args.name}@champion is version {restored} again; it was version {replaced}")
    return 0
