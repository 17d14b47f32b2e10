"""`refract sync RUN_DIR…`"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from refract.pipeline.cli import console

if TYPE_CHECKING:
    from refract.pipeline.tracking.journal import Journal
    from refract.pipeline.tracking.store import Store


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract sync",
        description="Deliver to MLflow what runs could not, as its server did not answer. Ends with 1 where it still does not.",
    )
    parser.add_argument(
        "folder", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs; runs/ without one"
    )
    parser.add_argument("--uri", help="the tracking server; without it the one of the run's config")
    args = parser.parse_args(argv)
    return console.run("sync", lambda: _sync(args.folder, args.uri))


def _sync(folders: list[Path], uri: str | None) -> int:
    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.tracking import tracking_uri
    from refract.pipeline.tracking.address import absolute
    from refract.pipeline.tracking.journal import JOURNAL, Journal
    from refract.pipeline.tracking.store import Store, first_line
    from refract.pipeline.tracking.tracker import deliver_one
    from refract.pipeline.training.run_directory import Held, held, stored_config

    runs = sorted({path.parent for folder in folders for path in folder.rglob(JOURNAL)})
    if not runs:
        raise ConfigError(f"no run with a {JOURNAL} in {', '.join(map(str, folders))}")
    failed = delivered = alone = 0
    for run in runs:
        waiting = "some"
        try:
            with held(run):
                journal = Journal(run)
                waiting = str(len(journal.waiting()))
                known = journal.delivered.get("uri")
                store = Store(absolute(uri or known or tracking_uri(stored_config(run).tracking)), run)
                journal.for_server(store.uri)
                count = len(journal.waiting())
                for entry in journal.waiting():
                    deliver_one(journal, store, entry)
                    waiting = str(len(journal.waiting()))
                count += _register_again(journal, store)
        except Held:
            print(f"{run}: left alone, as it is being trained: its training delivers")
            alone += 1
        except ConfigError as error:  # a damaged run
            print(f"{run}: {error}", file=sys.stderr)
            failed += 1
        except (
            Exception
        ) as error:  # whatever MLflow and what lies below it raise for a server that is not there or refuses the run
            print(f"{run}: {waiting} entries wait: {first_line(error)}", file=sys.stderr)
            failed += 1
        else:
            delivered += count
            if count:
                print(f"{run}: {count} entries delivered to {store.address}, run {journal.delivered['run_id']}")
                for line in _registered(journal, store.address):
                    print(line)
    if not delivered and not failed and not alone:
        print("nothing to deliver: MLflow has all of them")
    return 1 if failed else 0


def _register_again(journal: "Journal", store: "Store") -> int:
    """Send a registration once more that the server refused. Refused where it still does. Returns how many are delivered."""
    if not journal.delivered.get("refused") or journal.delivered.get("version"):
        return 0
    for entry in journal.of("register"):
        journal.keep(**store.deliver(entry, journal.delivered), refused=None)
    return 1


def _registered(journal: "Journal", uri: str) -> Iterator[str]:
    """Describe the version that the run became, and how to make it champion."""
    from refract.pipeline.cli.promote import by_hand, named

    answers = journal.delivered
    for entry in journal.of("register"):
        if version := answers.get("version"):
            alias, champion = answers.get("alias"), answers.get("champion")
            yield f"  {named(entry['model'], version, alias, champion)}"
            if alias != "champion":
                yield f"  {console.bin_prefix()}{by_hand(entry['model'], version, uri)} makes it champion"
