"""`refract config schema` and `refract config keys`"""

import argparse
import json

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract config",
        description="Print the JSON Schema of config files, for editors, or the keys with their defaults and meanings.",
        epilog="An editor with a YAML language server reads the schema from a first line such as "
        "`# yaml-language-server: $schema=refract.schema.json`.",
    )
    parser.add_argument("what", choices=["schema", "keys"], help="schema: JSON Schema; keys: the reference of all keys")
    args = parser.parse_args(argv)
    return console.run("config", lambda: _config(args.what))


def _config(what: str) -> int:
    from refract.pipeline.config.config import help_text
    from refract.pipeline.config.schema import json_schema

    if output.is_json():
        output.result(json_schema())  # it has the keys, their defaults and meanings, too
    else:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False) if what == "schema" else help_text())
    return 0
