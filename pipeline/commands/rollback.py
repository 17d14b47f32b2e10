"""`refract rollback NAME`"""

import argparse

from pipeline.commands import console
from pipeline.commands.promote import client_at, uri_option


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract rollback",
        description="Make the version champion again that was before: the aliases champion and previous change places.",
    )
    parser.add_argument("name", help="of the registered model")
    uri_option(parser)
    args = parser.parse_args(argv)
    return console.run("rollback", lambda: _rollback(args))


def _rollback(args: argparse.Namespace) -> int:
    from pipeline.retraining.aliases import rollback

    now, before = rollback(client_at(args.uri), args.name)
    print(f"models:/{args.name}@champion is version {now} again, and was {before}")
    return 0
