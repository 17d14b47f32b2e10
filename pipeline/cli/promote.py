"""`refract promote NAME VERSION`"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from refract.models.credentials import masked
from refract.pipeline.cli import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract promote",
        description="Make a registered version champion: one that passed the gate against the champion of now, or, with --force, any "
        "whose bundle is whole. Servers that follow the alias take it.",
    )
    parser.add_argument("name", help="of the registered model")
    parser.add_argument("version", help="its number")
    parser.add_argument("--force", action="store_true", help="without a gate that it passed; --why says the reason")
    parser.add_argument("--why", default="", help="kept as the version's tag promotion.why")
    uri_option(parser)
    args = parser.parse_args(argv)
    if args.force and not args.why.strip():
        print("refract promote: --force needs --why, the reason that others will read", file=sys.stderr)
        return 2
    return console.run("promote", lambda: _promote(args))


def uri_option(parser: argparse.ArgumentParser) -> None:
    """`--uri`, which names the registry."""
    parser.add_argument("--uri", help="the tracking server; else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here")


def named(name: str, version: str, alias: str | None, champion: str | None) -> str:
    """Describe what a training registered. alias: of the version; champion: the model's."""
    if alias == "champion":
        return f"models:/{name}@champion is version {version}, the model's first"
    other = f"version {champion} stays champion" if champion else "no version is champion"
    return f"version {version} of {name} is {alias or 'registered without an alias'}; {other}"


def by_hand(name: str, version: str, uri: str | None) -> str:
    """The command that makes a version champion that no gate has judged. uri: the tracking server, where the config names one; one with
    credentials is left to MLFLOW_TRACKING_URI."""
    server = f" --uri {shlex.quote(masked(uri))}" if uri and masked(uri) == uri else ""
    return f"refract promote {shlex.quote(name)} {version}{server} --force --why REASON"


def _promote(args: argparse.Namespace) -> int:
    from refract.pipeline.retraining.aliases import CHAMPION, PromotionError, aliases, numbered, promote, version_tags

    client, version = client_at(args.uri), numbered(args.version)
    champion = aliases(client, args.name).get(CHAMPION)
    tags = version_tags(client, args.name, version)
    if version == champion:
        promote(client, args.name, version, instead_of=champion, why=args.why, by_hand=True)
        print(f"models:/{args.name}@champion is version {version} already")
        return 0
    if not args.force and (tags.get("gate") != "passed" or tags.get("gate.against") != (champion or "none")):
        judged = (
            f"did not pass the gate against {champion or 'none'}, the champion"
            if "gate" in tags
            else "was judged by no gate"
        )
        raise PromotionError(f"{args.name}: version {version} {judged}; --force --why REASON promotes it all the same")
    try_to_load(client, args.name, version)
    promote(client, args.name, version, instead_of=champion, why=args.why, by_hand=True)
    print(f"models:/{args.name}@champion is version {version} now" + (f", and was {champion}" if champion else ""))
    return 0


def try_to_load(client: Any, name: str, version: str) -> None:
    """BundleError for a version's bundle that is damaged, PromotionError for one that cannot be fetched."""
    import tempfile

    from mlflow.exceptions import MlflowException

    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.retraining.aliases import PromotionError
    from refract.pipeline.retraining.registry import download

    with tempfile.TemporaryDirectory() as beside:
        try:
            folder = download(client, name, version, Path(beside))
        except (MlflowException, OSError) as error:
            raise PromotionError(
                f"{name}: the bundle of version {version} cannot be fetched ({masked(str(error))})"
            ) from error
        load_bundle(folder)


def client_at(uri: str | None) -> Any:
    """MLflow's client of the registry that is meant."""
    from refract.pipeline.config.sections import TrackingConfig
    from refract.pipeline.retraining.registry import client_of
    from refract.pipeline.tracking import tracking_uri
    from refract.pipeline.tracking.address import absolute

    return client_of(absolute(tracking_uri(TrackingConfig(uri=uri))))
