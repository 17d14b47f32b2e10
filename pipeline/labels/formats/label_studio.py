"""Label Studio's JSON: a list of tasks, each with an image and annotations of the control Choices.

A cancelled annotation is a skip. Each annotation is a decision of its annotator; without the annotator's e-mail address, its number is the
name, such as `annotator 3`. The written file keeps what Label Studio has no field for in the task's `data`, which its exports repeat, so
that a file that passed through Label Studio still names the image by its SHA-256.
Source: Label Studio's documentation of the task format and of `Choices`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refract.pipeline.files import write_atomically
from refract.pipeline.labels.decisions import Action, LabelError
from refract.pipeline.labels.formats.entry import Entry, LabelFile, action_named, label_names, time_of, time_text

CONTROL, OBJECT = "label", "image"
"""Names of the controls in the written file, as in `<Choices name="label" toName="image">`."""

PREFIX = "refract_"
"""Prefix of the fields in `data` that Refract adds."""


def read(path: Path) -> LabelFile:
    """Read an export. LabelError names the task and the key that cannot be read."""
    try:
        tasks = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LabelError(f"{path}: is not JSON ({error}); export the project from Label Studio as JSON") from error
    if not isinstance(tasks, list):
        raise LabelError(f"{path}: expected a list of tasks, got {type(tasks).__name__}; export the project as JSON")
    entries: list[Entry] = []
    unlabelled: list[str] = []
    for index, task in enumerate(tasks):
        where = f"{path}, task {task['id'] if isinstance(task, dict) and 'id' in task else index + 1}"
        of_task = list(_entries(task, where))
        entries += of_task
        if not of_task:
            unlabelled.append(f"{where}: {_image(task, where)}")
    return LabelFile(entries, unlabelled)


def _entries(task: Any, where: str) -> Iterator[Entry]:
    """Yield the decisions of a task: its annotations, else the decision that Refract wrote to it."""
    name, data = _image(task, where), task["data"]
    content = str(data.get(f"{PREFIX}content", ""))
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        raise LabelError(f"{where}: no list 'annotations'; export the project as JSON, not as JSON-MIN")
    written = data.get(f"{PREFIX}decision")
    original = _written_entry(written, name, content, where) if isinstance(written, dict) else None
    for number, annotation in enumerate(annotations, 1):
        at = f"{where}, annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result", []), list):
            raise LabelError(f"{at}: has no list 'result'")
        labels = _choices(annotation.get("result", []), at)
        cancelled = bool(annotation.get("was_cancelled"))
        if original and not cancelled and labels == original.labels and "completed_by" not in annotation:
            yield original  # as Refract wrote it: Label Studio adds `completed_by`
        elif cancelled or labels:
            reviewer = _annotator(annotation.get("completed_by"))
            time = time_of(str(annotation.get("updated_at") or annotation.get("created_at") or ""), at)
            action: Action = "skip" if cancelled else "relabel"
            yield Entry(at, name, action, () if cancelled else labels, reviewer, time, content=content)
    if not annotations and original:
        yield original


def _image(task: Any, where: str) -> str:
    """Return the address of the task's image: the field `image`, else the only field with a text. LabelError without one."""
    data = task.get("data") if isinstance(task, dict) else None
    if not isinstance(data, dict):
        raise LabelError(f"{where}: no mapping 'data'; export the project as JSON, not as JSON-MIN")
    if isinstance(data.get("image"), str):
        return str(data["image"])
    texts = [value for key, value in data.items() if isinstance(value, str) and not key.startswith(PREFIX)]
    if len(texts) != 1:
        raise LabelError(f"{where}: data: expected the key 'image'; got {', '.join(map(str, data)) or 'no key'}")
    return texts[0]


def _choices(results: Sequence[Any], where: str) -> tuple[str, ...]:
    """Return the chosen labels. LabelError for choices of two controls, whose meaning is unclear."""
    chosen = [r for r in results if isinstance(r, dict) and r.get("type") == "choices"]
    controls = sorted({str(result.get("from_name")) for result in chosen})
    if len(controls) > 1:
        raise LabelError(
            f"{where}: choices of {len(controls)} controls ({', '.join(controls)}); expected one <Choices>"
        )
    names: list[str] = []
    for result in chosen:
        value = result.get("value")
        names += _texts(value.get("choices") if isinstance(value, dict) else None, f"{where}: value.choices")
    return label_names(names)


def _annotator(value: Any) -> str:
    if isinstance(value, dict):
        if value.get("email"):
            return str(value["email"])
        value = value.get("id")
    return "" if value is None else f"annotator {value}"


def _written_entry(written: dict[str, Any], name: str, content: str, where: str) -> Entry:
    at = f"{where}, {PREFIX}decision"
    return Entry(
        where,
        name,
        action_named(str(written.get("action")), at),
        label_names(_texts(written.get("labels", []), f"{at}: labels")),
        str(written.get("reviewer", "")),
        time_of(str(written.get("time", "")), at),
        str(written.get("reason", "")),
        str(written.get("origin", "import")),
        content,
    )


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LabelError(f"{where}: expected a list of texts, got {value!r}")
    return value


def write(path: Path, entries: Sequence[Entry]) -> int:
    """Write a task for each entry. The labels are annotations; excluded images have none. Returns the number of tasks. OSError."""
    tasks = []
    for number, entry in enumerate(entries, 1):
        decision = {
            "action": entry.action,
            "labels": list(entry.labels),
            "reviewer": entry.reviewer,
            "time": time_text(entry.time),
            "reason": entry.reason,
            "origin": entry.origin,
        }
        result = {"from_name": CONTROL, "to_name": OBJECT, "type": "choices", "value": {"choices": list(entry.labels)}}
        data = {"image": entry.name, f"{PREFIX}content": entry.content, f"{PREFIX}decision": decision}
        tasks.append({"id": number, "data": data, "annotations": [{"result": [result]}] if entry.labels else []})
    write_atomically(path, (json.dumps(tasks, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))
    return len(tasks)
