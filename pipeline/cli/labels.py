"""`refract labels log|diff|set|undo|import|export DATABASE …`"""

import argparse
import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.labels.decisions import Decision, Record
    from refract.pipeline.labels.history import LabelHistory
    from refract.pipeline.labels.lookup import ImageLookup

FORMATS = "the suffix chooses the format: .csv, .tsv, .parquet, .json (Label Studio), .xml (CVAT for images 1.1)"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract labels",
        description="Read and extend a label history, the append-only record of decisions on labels that the config key data.labels\n"
        "applies (docs/labels.md). DATABASE is a file such as labels.db, or postgresql://USER@HOST/DATABASE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_log(commands)
    _add_diff(commands)
    _add_set(commands)
    _add_undo(commands)
    _add_import(commands)
    _add_export(commands)
    parser.epilog = "\n".join(command.format_help() for command in commands.choices.values())
    args = parser.parse_args(argv)
    if args.command == "set" and bool(args.label) == args.exclude:
        parser.error("set: expected either --label or --exclude")
    if args.command == "set" and args.new and args.exclude:
        parser.error("set: --new adds images, --exclude removes them; remove one of them")
    return console.run("labels", lambda: int(args.work(args)), plugins=getattr(args, "plugin", ()))


def _command(commands: Any, name: str, work: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text}.")
    parser.add_argument("database", metavar="DATABASE", help="the label history")
    parser.set_defaults(work=work)
    return parser


def _add_data(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("--data", metavar="SOURCE", required=required, help=f"{text}, as data.source of a config")
    console.add_plugin_option(parser)


def _add_reviewer(parser: argparse.ArgumentParser, text: str = "name of the reviewer") -> None:
    parser.add_argument("--reviewer", metavar="NAME", default=_user(), help=f"{text} (default: the user's name)")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _add_log(commands: Any) -> None:
    parser = _command(commands, "log", _log, "List the decisions: who, when, what and why")
    parser.add_argument("--image", metavar="TEXT", help="only images whose path ends so, or whose SHA-256 starts so")
    parser.add_argument("--reviewer", metavar="NAME", help="only decisions of this reviewer")
    parser.add_argument("--action", metavar="NAME", help="only this action, such as relabel")
    parser.add_argument("--since", metavar="MOMENT", default="0", help="only decisions after an ID or a time (UTC)")
    parser.add_argument("--conflicts", action="store_true", help="only the decisions of images in conflict")


def _add_diff(commands: Any) -> None:
    parser = _command(commands, "diff", _diff, "Show which labels differ between two moments, or from the data")
    parser.add_argument(
        "--from", dest="start", metavar="MOMENT", default="0", help="an ID or a time (default: the start)"
    )
    parser.add_argument("--to", dest="end", metavar="MOMENT", help="an ID or a time in UTC (default: now)")
    _add_data(parser, "name the labels of this data set, all of whose images are read")


def _add_set(commands: Any) -> None:
    parser = _command(commands, "set", _set, "Decide on images: set their labels, add or exclude them")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or with --data a name of the data set")
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME", help="a label; repeat the option for more"
    )
    parser.add_argument("--exclude", action="store_true", help="exclude the images from the data")
    parser.add_argument("--new", action="store_true", help="add the images to the data, which lacks them")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why")
    parser.add_argument("--new-classes", action="store_true", help="accept labels that neither DATABASE nor SOURCE has")
    _add_reviewer(parser)
    _add_data(parser, "the data set")


def _add_undo(commands: Any) -> None:
    parser = _command(commands, "undo", _undo, "Undo decisions by further records; an undo can be undone")
    parser.add_argument(
        "ids", nargs="+", type=int, metavar="ID", help="of a decision, which `refract labels log` lists"
    )
    parser.add_argument("--reason", default="", metavar="TEXT", help="why")
    _add_reviewer(parser)


def _add_import(commands: Any) -> None:
    parser = _command(commands, "import", _import, "Record the decisions of a file; a repeated import records nothing")
    parser.add_argument("file", type=Path, metavar="FILE", help=FORMATS)
    parser.add_argument("--new-classes", action="store_true", help="accept labels that neither DATABASE nor SOURCE has")
    _add_reviewer(parser, "reviewer of decisions for which FILE names none")
    _add_data(parser, "the data set whose images FILE names", required=True)


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", _export, "Write the decision that applies to each image to a file")
    parser.add_argument("file", type=Path, metavar="FILE", help=FORMATS)
    parser.add_argument(
        "--prefix",
        default="",
        metavar="TEXT",
        help="text before each path, such as /data/local-files/?d= of Label Studio",
    )


def _log(args: argparse.Namespace) -> int:
    from refract.pipeline.labels.decisions import ACTIONS, LabelError
    from refract.pipeline.labels.difference import moment
    from refract.pipeline.labels.state import state_of, undone_by

    if args.action not in (None, *ACTIONS):
        raise LabelError(f"--action: {args.action!r} is not one of {', '.join(ACTIONS)}")
    history = _opened(args.database)
    records = history.decisions()
    undone, conflicts = undone_by(records), state_of(records).conflicts()
    contents = {one.applied.content for one in conflicts}
    since = moment(history, args.since)
    shown = [
        record
        for record in records
        if record.id > since
        and (args.reviewer is None or record.reviewer == args.reviewer)
        and (args.action is None or record.action == args.action)
        and (args.image is None or record.path.endswith(args.image) or record.content.startswith(args.image))
        and (record.content in contents or not args.conflicts)
    ]
    for record in shown:
        print(_line(record, undone.get(record.id)))
    if conflicts:
        hint = "" if args.conflicts else f"; `refract labels log {args.database} --conflicts` lists them"
        print(f"conflicting decisions: {_counted(len(conflicts), 'image')}{hint}")
    output.result([_as_dict(record, undone.get(record.id), record.content in contents) for record in shown])
    return 0


def _line(record: "Record", undone: int | None) -> str:
    what = f"undo {record.undoes}" if record.action == "undo" else f"{record.action} {';'.join(record.labels)}".strip()
    why = f"  ({record.reason})" if record.reason else ""
    off = f"  undone by {undone}" if undone is not None else ""
    return _printable(
        f"{record.id:>5}  {record.time:%Y-%m-%d %H:%M:%SZ}  {record.reviewer}  {what}  {record.path}{why}{off}"
    )


def _printable(line: str) -> str:
    """Return the line without control characters, which a name or a reason may hold and a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _as_dict(record: "Record", undone: int | None, conflict: bool) -> dict[str, Any]:
    return {**vars(record), "time": record.time.isoformat(), "recorded": record.recorded.isoformat(), "undone_by": undone,
            "conflict": conflict}  # fmt: skip


def _diff(args: argparse.Namespace) -> int:
    from refract.pipeline.labels.difference import difference, moment
    from refract.pipeline.labels.importing import contents_of

    history = _opened(args.database)
    end = None if args.end is None else moment(history, args.end)
    states = history.state(until=moment(history, args.start)), history.state(until=end)
    data = None if args.data is None else _manifest(args.data)
    shown = difference(*states, data, None if data is None else contents_of(data))
    for image in shown.images:
        print(_printable(f"{image.path}: {image.before or 'no label'} → {image.after or 'no label'}"))
    print(_printable(shown.text()))
    pairs = [{"before": old, "after": new, "images": count} for (old, new), count in shown.pairs.most_common()]
    output.result({"images": [vars(image) for image in shown.images], "pairs": pairs})
    return 0


def _set(args: argparse.Namespace) -> int:
    from refract.pipeline.labels.formats.entry import label_names
    from refract.pipeline.labels.importing import check_labels
    from refract.pipeline.labels.lookup import ImageLookup

    data = None if args.data is None else _manifest(args.data)
    history = _opened(args.database, create=True)
    state, labels = history.state(), label_names(args.label)
    if not args.new_classes:
        known = state.labels() | set(() if data is None else data.labels)
        check_labels([("--label", label) for label in labels], known)
    last = {record.content: record.id for record in history.decisions()}
    lookup = None if data is None or args.new else ImageLookup(data)
    decisions = [_decision(history, lookup, image, args, labels, last) for image in args.images]
    ids = history.extend(decisions)
    for number, decision in zip(ids, decisions, strict=True):
        labels_of = f" {';'.join(decision.labels)}" if decision.labels else ""
        print(_printable(f"decision {number}: {decision.action}{labels_of} {decision.path}"))
    output.result({"recorded": ids})
    return 0


def _decision(
    history: "LabelHistory",
    lookup: "ImageLookup | None",
    image: str,
    args: argparse.Namespace,
    labels: tuple[str, ...],
    last: dict[str, int],
) -> "Decision":
    from refract.pipeline.data.storage import sha256
    from refract.pipeline.labels.apply import path_of
    from refract.pipeline.labels.decisions import Decision, LabelError
    from refract.pipeline.labels.importing import content_of

    sample = None if lookup is None else lookup.find(image)
    try:
        content = sha256(image) if sample is None else content_of(sample)
    except OSError as error:
        remedy = "" if args.data is not None else "; --data SOURCE finds images of a data set by name"
        raise LabelError(f"{image}: cannot be read ({error.strerror or error}){remedy}") from error
    return Decision(
        content=content,
        path=history.relative(image) if sample is None else path_of(history, sample),
        action="exclude" if args.exclude else "add" if args.new else "relabel",
        labels=labels,
        reviewer=args.reviewer,
        reason=args.reason,
        seen=last.get(content),
    )


def _undo(args: argparse.Namespace) -> int:
    history = _opened(args.database)
    ids = history.undo_all(args.ids, reviewer=args.reviewer, reason=args.reason)
    for undone, number in zip(args.ids, ids, strict=True):
        print(f"decision {number}: undo {undone}")
    output.result({"recorded": ids})
    return 0


def _import(args: argparse.Namespace) -> int:
    from refract.pipeline.labels.importing import import_labels

    data = _manifest(args.data)
    history = _opened(args.database, create=True)
    done = import_labels(history, args.file, data, reviewer=args.reviewer, new_classes=args.new_classes)
    print(f"recorded {_counted(len(done.recorded), 'decision')}; known before: {done.known:,}")
    _list("not found in the data", done.unknown)
    _list("without a label in the file", done.unlabelled)
    _list("with another decision further down in the file, which applies", done.replaced)
    _list(
        "whose decision in the file is older than the one that applied; `refract labels undo` restores it", done.older
    )
    output.result(vars(done))
    return 0


def _list(about: str, lines: Sequence[str]) -> None:
    """Print the number of lines and the first ones."""
    if lines:
        print(f"{_counted(len(lines), 'image')} {about}:")
        print("\n".join(f"  {_printable(line)}" for line in lines[:20]) + ("\n  …" if len(lines) > 20 else ""))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _export(args: argparse.Namespace) -> int:
    from refract.pipeline.labels.importing import export_labels

    count = export_labels(_opened(args.database), args.file, prefix=args.prefix)
    print(f"wrote the decisions on {_counted(count, 'image')} to {args.file}")
    output.result({"file": args.file, "images": count})
    return 0


def _opened(address: str, *, create: bool = False) -> "LabelHistory":
    from refract.pipeline.labels.history import LabelHistory

    return LabelHistory(address, create=create)


def _manifest(source: str) -> "Manifest":
    from refract.pipeline.data.manifest import load_manifest

    return load_manifest(source, to_train=False)
