"""`refract promote NAME VERSION`"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract import output
from refract.models.credentials import masked
from refract.pipeline import console

if TYPE_CHECKING:
    from mlflow import MlflowClient


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract promote",
        description="Make a registered version champion: one that passed the gate against the present champion, or, with --force, any "
        "version whose bundle loads. Servers that follow the alias load it.",
    )
    parser.add_argument("name", help="registered model")
    parser.add_argument("version", help="version number, such as 3")
    parser.add_argument("--force", action="store_true", help="promote without a passed gate; needs --why")
    parser.add_argument("--why", default="", help="reason, stored as the version's tag promotion.why")
    uri_option(parser)
    args = parser.parse_args(argv)
    if args.force and not args.why.strip():
        print("refract promote: --force needs a reason; add --why REASON", file=sys.stderr)
        return 2
    return console.run("promote", lambda: _promote(args))


def uri_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--uri`, the registry's address."""
    parser.add_argument(
        "--uri", help="MLflow server; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in this folder"
    )


def named(name: str, version: str, alias: str | None, champion: str | None) -> str:
    """Describe a registered version. alias: the version's; champion: the version number of the model's champion."""
    if alias == "champion":
        return f"models:/{name}@champion is version {version}, the model's first"
    other = f"version {champion} stays champion" if champion else "no version is champion"
    return f"version {version} of {name} is {alias or 'registered without an alias'}; {other}"


def by_hand(name: str, version: str, uri: str | None) -> str:
    """Return the command that promotes a version without a gate.

    uri: the config's tracking server, if any. An address with credentials is omitted, as MLFLOW_TRACKING_URI provides it.
    """
    server = f" --uri {shlex.quote(masked(uri))}" if uri and masked(uri) == uri else ""
    return f"refract promote {shlex.quote(name)} {version}{server} --force --why REASON"


def _promote(args: argparse.Namespace) -> int:
    from refract.pipeline.tracking.aliases import CHAMPION, PromotionError, aliases, numbered, promote, version_tags

    client, version = client_at(args.uri), numbered(args.version)
    champion = aliases(client, args.name).get(CHAMPION)
    tags = version_tags(client, args.name, version)
    if version == champion:
        promote(client, args.name, version, instead_of=champion, why=args.why, by_hand=True)
        print(f"models:/{args.name}@champion is already version {version}")
        output.result({"model": args.name, "champion": version, "before": version})
        return 0
    if not args.force and (tags.get("gate") != "passed" or tags.get("gate.against") != (champion or "none")):
        status = (
            f"did not pass the gate against the present champion ({f'version {champion}' if champion else 'none'})"
            if "gate" in tags
            else "was not compared by a gate"
        )
        raise PromotionError(f"{args.name}: version {version} {status}; to promote it anyway, add --force --why REASON")
    try_to_load(client, args.name, version)
    promote(client, args.name, version, instead_of=champion, why=args.why, by_hand=True)
    output.result({"model": args.name, "champion": version, "before": champion})
    print(
        f"models:/{args.name}@champion is now version {version}" + (f", before version {champion}" if champion else "")
    )
    return 0


def try_to_load(client: "MlflowClient", name: str, version: str) -> None:
    """Load a version's bundle. BundleError if it is damaged, PromotionError if it cannot be downloaded."""
    import tempfile

    from mlflow.exceptions import MlflowException

    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.tracking.aliases import PromotionError
    from refract.pipeline.tracking.model_registry import download

    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = download(client, name, version, Path(temporary))
        except (MlflowException, OSError) as error:
            raise PromotionError(
                f"{name}: the bundle of version {version} cannot be downloaded ({masked(str(error))})"
            ) from error
        load_bundle(folder)


def client_at(uri: str | None) -> Any:
    """Return the MLflow client of the registry. uri: as the option `--uri`."""
    from refract.pipeline.config.sections import TrackingConfig
    from refract.pipeline.tracking import tracking_uri
    from refract.pipeline.tracking.address import absolute
    from refract.pipeline.tracking.model_registry import client_of

    return client_of(absolute(tracking_uri(TrackingConfig(uri=uri))))
