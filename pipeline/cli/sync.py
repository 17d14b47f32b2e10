"""`refract sync RUN_DIR…`"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline.cli import console

if TYPE_CHECKING:
    from refract.pipeline.tracking.journal import Journal
    from refract.pipeline.tracking.store import Store


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract sync",
        description="Deliver the pending entries of runs to MLflow, after its server was unreachable. Exit code 1 if an entry is "
        "not accepted.",
    )
    parser.add_argument(
        "folder", nargs="*", type=Path, default=[Path("runs")], help="run folders, or folders of runs (default: runs/)"
    )
    parser.add_argument("--uri", help="MLflow server (default: as in the run's config)")
    args = parser.parse_args(argv)
    return console.run("sync", lambda: _sync(args.folder, args.uri))


def _sync(folders: list[Path], uri: str | None) -> int:
    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.tracking import tracking_uri
    from refract.pipeline.tracking.address import absolute
    from refract.pipeline.tracking.journal import JOURNAL, Journal
    from refract.pipeline.tracking.store import Store, first_line
    from refract.pipeline.tracking.tracker import deliver_one
    from refract.pipeline.training.run_directory import RunLocked, run_lock, stored_config

    runs = sorted({path.parent for folder in folders for path in folder.rglob(JOURNAL)})
    if not runs:
        raise ConfigError(
            f"no run with a {JOURNAL} in {', '.join(map(str, folders))}; name run folders, such as runs/NAME"
        )
    failed = delivered = skipped = 0
    for run in runs:
        waiting = "some"
        try:
            with run_lock(run):
                journal = Journal(run)
                waiting = str(len(journal.waiting()))
                previous = journal.delivered.get("uri")
                store = Store(absolute(uri or previous or tracking_uri(stored_config(run).tracking)), run)
                journal.for_server(store.uri)
                count = len(journal.waiting())
                for entry in journal.waiting():
                    deliver_one(journal, store, entry)
                    waiting = str(len(journal.waiting()))
                count += _register_again(journal, store)
        except RunLocked:
            print(f"{run}: skipped, as its training is in progress and delivers its entries")
            skipped += 1
        except ConfigError as error:  # a damaged run
            print(f"{run}: {error}", file=sys.stderr)
            failed += 1
        except (
            Exception
        ) as error:  # MLflow and the libraries below it raise many types for a server that fails or refuses the run
            print(f"{run}: {waiting} entries are not delivered: {first_line(error)}", file=sys.stderr)
            failed += 1
        else:
            delivered += count
            if count:
                print(f"{run}: {count} entries delivered to {store.address}, run {journal.delivered['run_id']}")
                for line in _registered(journal, store.address):
                    print(line)
    if not delivered and not failed and not skipped:
        print("nothing to deliver: MLflow has all entries")
    output.result({"runs": len(runs), "delivered": delivered, "failed": failed, "skipped": skipped})
    return 1 if failed else 0


def _register_again(journal: "Journal", store: "Store") -> int:
    """Repeat a registration that the server refused. Returns the number of delivered entries. Refused if the server refuses again."""
    if not journal.delivered.get("refused") or journal.delivered.get("version"):
        return 0
    for entry in journal.of("register"):
        journal.keep(**store.deliver(entry, journal.delivered), refused=None)
    return 1


def _registered(journal: "Journal", uri: str) -> Iterator[str]:
    """Describe the run's registered version, and how to promote it."""
    from refract.pipeline.cli.promote import by_hand, named

    delivered = journal.delivered
    for entry in journal.of("register"):
        if version := delivered.get("version"):
            alias, champion = delivered.get("alias"), delivered.get("champion")
            yield f"  {named(entry['model'], version, alias, champion)}"
            if alias != "champion":
                yield f"  {console.bin_prefix()}{by_hand(entry['model'], version, uri)} makes it champion"
