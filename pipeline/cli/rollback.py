"""`refract rollback NAME`"""

import argparse

from refract.pipeline.cli import console
from refract.pipeline.cli.promote import client_at, try_to_load, uri_option


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract rollback",
        description="Make the version champion again that was before, if its bundle is whole: the aliases champion and previous "
        "change places.",
    )
    parser.add_argument("name", help="of the registered model")
    uri_option(parser)
    args = parser.parse_args(argv)
    return console.run("rollback", lambda: _rollback(args))


def _rollback(args: argparse.Namespace) -> int:
    from refract.pipeline.retraining.aliases import rollback, way_back

    client = client_at(args.uri)
    expected = way_back(client, args.name)
    try_to_load(client, args.name, expected[1])
    now, before = rollback(client, args.name, expected=expected)
    print(f"models:/{args.name}@champion is version {now} again, and was {before}")
    return 0
