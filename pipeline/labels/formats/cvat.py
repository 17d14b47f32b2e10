"""CVAT for images 1.1: an XML file whose `image` elements have `tag` elements, the labels of the whole image.

Shapes such as boxes are ignored. The format has no reviewer, time, reason or exclusion.
Source: CVAT's documentation of the XML annotation format, version 1.1.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from refract.augment.decoding.decode import image_size
from refract.pipeline.data.storage import read as read_stored
from refract.pipeline.files import write_atomically
from refract.pipeline.labels.decisions import LabelError
from refract.pipeline.labels.formats.entry import Entry, LabelFile, label_names

VERSION = "1.1"


def read(path: Path) -> LabelFile:
    """Read an annotation file. LabelError names the line or the image that cannot be read."""
    root = _root(path)
    entries: list[Entry] = []
    unlabelled: list[str] = []
    if root.tag != "annotations":
        raise LabelError(f"{path}: the root is <{root.tag}>; expected <annotations>, as in 'CVAT for images 1.1'")
    version = (root.findtext("version") or "").strip()
    if version not in ("", VERSION):
        raise LabelError(f"{path}: version {version!r} of the format; expected {VERSION}")
    if root.find("track") is not None:
        raise LabelError(f"{path}: has tracks, as in 'CVAT for video'; export the task as 'CVAT for images 1.1'")
    for index, image in enumerate(root.iter("image")):
        where = f"{path}, image {image.get('id', index)}"
        name = image.get("name")
        if not name:
            raise LabelError(f"{where}: no attribute 'name'")
        tags = [tag.get("label") for tag in image.findall("tag")]
        if None in tags:
            raise LabelError(f"{where} ({name}): a <tag> has no attribute 'label'")
        labels = label_names([tag for tag in tags if tag is not None])
        if labels:
            entries.append(Entry(where, name, "relabel", labels))
        else:
            unlabelled.append(f"{where}: {name}")
    return LabelFile(entries, unlabelled)


def _root(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. LabelError for other files."""
    try:
        return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_Builder(path)))
    except ElementTree.ParseError as error:
        line, column = error.position
        raise LabelError(
            f"{path}, line {line}, column {column + 1}: is not XML ({error.msg}); unpack a ZIP first"
        ) from error
    except LabelError:
        raise
    except (LookupError, ValueError) as error:  # an encoding that Python lacks, or that XML cannot have
        raise LabelError(f"{path}: is not XML in UTF-8 ({error}); export the task again") from error


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree of a file without a document type, whose entities could expand to gigabytes, in any encoding."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise LabelError(f"{self._path}: declares a document type, which CVAT's files do not; export the task again")


def write(path: Path, entries: Sequence[Entry]) -> int:
    """Write an `image` element for each entry that is not excluded, and return their number.

    `Entry.where` is the image's file, whose size is written. LabelError if it cannot be read.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = VERSION
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    included = [entry for entry in entries if entry.action != "exclude"]
    for key, text in (("name", path.stem), ("size", str(len(included))), ("mode", "annotation")):
        ElementTree.SubElement(task, key).text = text
    labels = ElementTree.SubElement(task, "labels")
    for name in sorted({name for entry in included for name in entry.labels}):
        label = ElementTree.SubElement(labels, "label")
        for key, text in (("name", name), ("type", "tag"), ("attributes", "")):
            ElementTree.SubElement(label, key).text = text
    for index, entry in enumerate(included):
        height, width = _size(entry.where)
        attributes = {"id": str(index), "name": entry.name, "width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", attributes)
        for name in entry.labels:
            ElementTree.SubElement(image, "tag", {"label": name, "source": "manual"})
    ElementTree.indent(root)
    write_atomically(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
    return len(included)


def _size(file: str) -> tuple[int, int]:
    try:
        return image_size(read_stored(file))
    except (OSError, ValueError) as error:
        raise LabelError(f"{file}: cannot be read ({error}); CVAT's format needs the size of each image") from error
