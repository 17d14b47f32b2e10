"""Find the images that a file of labels names in a data set: by path, by the end of a path, or by the address in an annotation tool."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from refract.pipeline.data.manifest import Manifest, Sample

_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")
"""Label Studio's prefix of the names of uploaded files."""


class ImageLookup:
    """The samples of a data set and the images added to it, by the names that other tools give to their images."""

    def __init__(self, manifest: Manifest, added: Sequence[Sample] = ()) -> None:
        root = Path(manifest.source)
        root = root if root.is_dir() else root.parent
        self._by_path: dict[str, Sample] = {}
        self._by_end: dict[tuple[str, ...], list[tuple[tuple[str, ...], Sample]]] = defaultdict(list)
        for sample in (*manifest.samples, *added):
            if sample.has_image and sample.path not in self._by_path:
                path = Path(sample.path)
                parts = (path.relative_to(root) if path.is_relative_to(root) else path).parts
                self._by_path[sample.path] = sample
                # By the name, and by the folder and the name: in some data sets, all images have the same name.
                for end in (parts[-1:], ("", *parts)[-2:]):
                    self._by_end[end].append((parts, sample))

    def find(self, name: str) -> Sample | None:
        """Return the sample of a name; None if no sample or several ones fit.

        A sample fits if its path in the data set is the end of the name, such as `/mnt/photos/cat/1.jpg` for `cat/1.jpg`, or the name is
        the end of its path, such as `1.jpg`.
        """
        if name in self._by_path:
            return self._by_path[name]
        parts = _parts(name)
        if not parts:
            return None
        samples = self._ending(parts)
        if not samples and _UPLOAD.match(parts[-1]):  # an upload has lost its folders
            samples = self._ending((_UPLOAD.sub("", parts[-1], count=1),))
        return samples[0] if len(samples) == 1 else None

    def _ending(self, parts: tuple[str, ...]) -> Sequence[Sample]:
        if len(parts) == 1:
            return [sample for _, sample in self._by_end.get(parts, ())[:2]]  # two suffice: the name is ambiguous
        fitting = []
        for path, sample in (*self._by_end.get(parts[-2:], ()), *self._by_end.get(("", parts[-1]), ())):
            length = min(len(path), len(parts))
            if path[-length:] == parts[-length:]:
                fitting.append((length, sample))
        longest = max((length for length, _ in fitting), default=0)
        return [sample for length, sample in fitting if length == longest]


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of the path in a name, which may be an address such as `/data/local-files/?d=cat/1.jpg`."""
    try:
        address = urlsplit(name) if "://" in name or "?d=" in name else None
    except ValueError:  # a host in brackets that is not an address
        return ()
    if address is not None:
        name = next(iter(parse_qs(address.query).get("d", ())), unquote(address.path))
    path = PurePosixPath(name.replace("\\", "/"))
    return tuple(part for part in path.parts if part not in ("/", "."))
