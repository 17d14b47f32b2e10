"""`refract feedback FILE --url URL`: send the true labels of earlier predictions to a server."""

import argparse
import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract import output

if TYPE_CHECKING:
    from refract.serve.client import Client, ServerError

MOST_REPORTED = 10
"""Most refused lines that are printed one by one."""

FORMATS = ".csv, .jsonl and .ndjson"


@dataclass(frozen=True)
class Row:
    """One feedback of a file. line: its number, from 1."""

    line: int
    id: str
    labels: list[str]
    index: int | None


def main(argv: list[str]) -> int:
    """Send each line in order. Returns 0 if all were accepted, 1 if some were not or the server is unreachable, 2 for invalid input."""
    parser = argparse.ArgumentParser(
        prog="refract feedback", description="Send the true labels of earlier predictions to a server."
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a CSV file with the columns id, labels (several separated by ;) and, if needed, index; or JSON lines with these members. "
        "id is the X-Request-Id of the response, index the position of the image in its request",
    )
    parser.add_argument(
        "--url",
        action="append",
        required=True,
        help="URL of the server, such as http://localhost:8000; repeat it for each replica: the one that knows the id receives the labels",
    )
    parser.add_argument(
        "--key",
        default=os.environ.get("REFRACT_KEY"),
        help="API key, if the server requires one; default: the environment variable REFRACT_KEY",
    )
    args = parser.parse_args(argv)
    from refract.serve.client import Client

    try:
        rows = list(_rows(args.file))
    except OSError as err:
        parser.error(f"{args.file}: {err.strerror}")
    except ValueError as err:
        parser.error(f"{args.file}: {err}")
    try:
        unopened = [Client(url, key=args.key) for url in args.url]
    except ValueError as err:
        parser.error(f"--{err}")
    with ExitStack() as stack:
        return _send_all([stack.enter_context(client) for client in unopened], rows, args.file)


def _send_all(clients: "list[Client]", rows: list[Row], file: Path) -> int:
    from refract.serve.client import ServerError

    counts: Counter[str] = Counter()
    for row in rows:
        try:
            answer = _send(clients, row)
        except ServerError as err:
            stopped = err.status in (0, 401, 403) or err.code == "feedback_disabled"
            if stopped or (failed := counts["unknown"] + counts["refused"]) < MOST_REPORTED:
                _report(f"{file}: line {row.line}: {_message(err)}")
            elif failed == MOST_REPORTED:
                _report("further lines that are not accepted are only counted")
            if stopped:  # the other lines would fail, too
                _report(
                    f"{len(rows) - sum(counts.values())} lines were not sent; run the command again, it repeats lines safely"
                )
                break
            counts["unknown" if err.code == "unknown_prediction" else "refused"] += 1
        else:
            counts["replaced" if answer["replaced"] else "accepted"] += 1
    names = ("accepted", "replaced", "unknown", "refused")
    if output.is_json():
        output.result({name: counts[name] for name in names})
    else:
        print(", ".join(f"{name} {counts[name]}" for name in names))
    return 0 if counts["accepted"] + counts["replaced"] == len(rows) else 1


def _send(clients: "list[Client]", row: Row) -> dict[str, Any]:
    """Send a row to the first server that knows its id. ServerError of the last server that was asked."""
    from refract.serve.client import ServerError

    *others, last = clients
    for client in others:
        try:
            return client.feedback(row.id, row.labels, index=row.index)
        except ServerError as err:
            if err.code != "unknown_prediction":
                raise
    return last.feedback(row.id, row.labels, index=row.index)


def _rows(file: Path) -> Iterator[Row]:
    """Read a file. ValueError names the line and what is accepted."""
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".ndjson"):
        raise ValueError(f"unknown format {suffix!r}; accepted are {FORMATS}")
    text = file.read_text("utf-8-sig")
    yield from _csv_rows(text) if suffix == ".csv" else _json_rows(text)


def _csv_rows(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        if sorted(columns) not in (["id", "labels"], ["id", "index", "labels"]):
            raise ValueError(f"line 1: the columns are {', '.join(columns)}; expected id, labels and perhaps index")
        for values in reader:
            if None in values or None in values.values():
                raise ValueError(f"line {reader.line_num}: expected {len(columns)} fields")
            labels = [label for part in values["labels"].split(";") if (label := part.strip())]
            index = values.get("index", "").strip()
            if index and not index.isdecimal():
                raise ValueError(f"line {reader.line_num}: index {index!r} is not a whole number from 0")
            yield _row(reader.line_num, values["id"].strip(), labels, int(index) if index else None)
    except csv.Error as err:
        raise ValueError(f"line {reader.reader.line_num}: {err}") from err


def _json_rows(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise ValueError(f"line {number}: not JSON: {err}") from err
        labels = values.get("labels") if isinstance(values, dict) else None
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f'line {number}: expected an object such as {{"id": "…", "labels": ["cat"]}}')
        yield _row(number, values.get("id"), labels, values.get("index"))


def _row(line: int, request_id: object, labels: list[str], index: object) -> Row:
    if not isinstance(request_id, str) or not request_id:
        raise ValueError(f"line {line}: id: expected the X-Request-Id of a response")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        raise ValueError(f"line {line}: index {index!r} is not a whole number from 0")
    if any("\ud800" <= character <= "\udfff" for character in "".join([request_id, *labels])):
        raise ValueError(f"line {line}: contains a surrogate, which is half of a character")
    return Row(line, request_id, labels, index)


def _message(err: "ServerError") -> str:
    if err.status == 401:
        return f"{err}; pass the API key as --key KEY or in the environment variable REFRACT_KEY"
    return str(err)


def _report(message: str) -> None:
    print(f"refract feedback: {message}", file=sys.stderr)
