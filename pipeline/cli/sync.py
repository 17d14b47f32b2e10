"""`refract sync RUN_DIR…`"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.errors import RefractError
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.tracking.journal import Journal
    from refract.pipeline.tracking.store import Store


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract sync",
        description="Deliver the pending entries of runs to MLflow, after its server was unreachable, and complete the copies of runs with "
        "trainer.copy_to. Exit code 1 if an entry or a copy is not accepted.",
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

    runs = _folders_with(JOURNAL, folders)
    copied = _copied(folders)
    if not runs and not copied:
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
    if runs and not delivered and not failed and not skipped:
        print("nothing to deliver: MLflow has all entries")
    incomplete = sum(not _complete(run, url) for run, url in copied.items())
    copies = {"copies": len(copied), "incomplete": incomplete} if copied else {}
    output.result({"runs": len(runs), "delivered": delivered, "failed": failed, "skipped": skipped, **copies})
    return 1 if failed or incomplete else 0


def _copied(folders: list[Path]) -> dict[Path, str]:
    """Return folder of a run → its `trainer.copy_to`, for the runs that have one."""
    import yaml

    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.training.run_directory import CONFIG, RECORD, read_record

    urls = {}
    for run in _folders_with(RECORD, folders):
        with suppress(OSError, yaml.YAMLError, ConfigError):
            read_record(run)  # not that of a retraining
            values = yaml.safe_load((run / CONFIG).read_text("utf-8"))
            if isinstance(values, dict) and (url := (values.get("trainer") or {}).get("copy_to")):
                urls[run] = url
    return urls


def _folders_with(name: str, folders: list[Path]) -> list[Path]:
    """Return the folders that have a file of this name, but unfinished ones."""
    below = ((path, path.relative_to(folder)) for folder in folders for path in folder.rglob(name))
    return sorted({path.parent for path, place in below if not any(part.startswith(".") for part in place.parts)})


def _complete(run: Path, url: str) -> bool:
    """Bring the copy of a run up to date. Returns whether it is, or the run's training does it."""
    from refract.pipeline.training.run_copy import RunCopy
    from refract.pipeline.training.run_directory import RunLocked, run_lock

    copy = RunCopy(run, url)
    try:
        with run_lock(run):
            copy.update()
    except RunLocked:
        print(f"{run}: skipped, as its training is in progress and copies it")
    except (RefractError, OSError) as error:
        print(f"{run}: its copy is not complete: {error}", file=sys.stderr)
        return False
    else:
        print(f"{run}: {copy.url} is complete")
    return True


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
