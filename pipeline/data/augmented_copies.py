"""Write augmented copies of the images in a folder, and the plans that reproduce the same files."""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2

from refract.augment import Augmenter, ImageError, Plan, image_size
from refract.pipeline.data.manifest import DataError
from refract.pipeline.files import write_atomically
from refract.progress import tracked

PLANS = "plans.jsonl"
_QUALITY = 95


@dataclass(frozen=True)
class Copy:
    """One file to write.

    source: path in the image folder; output: path in the output folder; digest: SHA-256 of the source's bytes.
    """

    source: str
    output: str
    digest: str
    plan: Plan

    def to_json(self) -> str:
        plan = json.loads(self.plan.to_json())
        # ASCII, as names may contain any byte, and characters that some readers take for the end of a line.
        return json.dumps({"source": self.source, "output": self.output, "sha256": self.digest, "plan": plan})


def draw_plans(policy: str, source: Path, *, copies: int, seed: int, size: int | None, kind: str) -> list[Copy]:
    """Draw a plan for each copy of each image below `source`: copy k of image i is the draw of epoch k and index i.

    kind: `jpg` or `png`. DataError lists the images that cannot be read; PolicyError for a policy that mixes a batch.
    """
    from refract.augment import PolicyError
    from refract.pipeline.data.archives.archive import archive_path
    from refract.pipeline.data.image_paths import listed_images

    augmenter = Augmenter(policy, seed, size=size)
    if augmenter.mixes:
        raise PolicyError(f"{policy}: MixUp and CutMix mix labels, which image files lack; remove them from the policy")
    entries, broken = [], []
    if archive_path(str(source)) is not None:
        raise DataError(f"{source}: is an archive; extract it, and name the folder")
    for index, file in enumerate(map(Path, listed_images([source]))):
        data = file.read_bytes()
        name = str(file.relative_to(source)) if file != source else file.name
        try:
            shape = image_size(data)
        except ImageError as error:
            broken.append(f"{file}: {error}")
            continue
        digest = hashlib.sha256(data).hexdigest()
        for copy in range(copies):
            output = f"{_stem(name)}_{copy}.{kind}"
            entries.append(Copy(name, output, digest, augmenter.draw(shape, epoch=copy, index=index)))
    if broken:
        raise DataError(_listed("cannot be read", broken))
    return entries


def read_plans(path: Path) -> list[Copy]:
    """Read the `plans.jsonl` that `write_copies` wrote. DataError names an invalid line."""
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            data = json.loads(line)
            output = Path(data["output"])
            if output.is_absolute() or ".." in output.parts or output.suffix not in (".jpg", ".png"):
                raise ValueError(f"output {data['output']!r} is not a .jpg or .png inside the folder")
            entries.append(
                Copy(data["source"], data["output"], data["sha256"], Plan.from_json(json.dumps(data["plan"])))
            )
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not an entry of a {PLANS} ({error!r})") from error
    if not entries:
        raise DataError(f"{path}: contains no plans")
    return entries


def write_copies(entries: Sequence[Copy], source: Path, target: Path, *, jobs: int) -> int:
    """Write the files and `plans.jsonl` into `target`, a new or empty folder. Returns the number of images.

    DataError lists the images that are missing, changed or damaged; all others are written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: is not an empty folder; choose a new folder")
    write_atomically(target / PLANS, "".join(entry.to_json() + "\n" for entry in entries).encode())
    cv2.setNumThreads(1)
    folder = source.parent if source.is_file() else source
    broken = []
    augmenter = Augmenter("none", color_profile="convert")  # the written files have no color profile

    def work(entry: Copy) -> str | None:
        try:
            data = (folder / entry.source).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.digest:
                return f"{source / entry.source}: is not the image of the plan (the SHA-256 differs)"
            write_atomically(target / entry.output, _encoded(augmenter.apply(entry.plan, data), entry.output))
        except ImageError as error:
            return f"{source / entry.source}: {error}"
        except ValueError as error:  # an edited plan
            return f"{entry.output}: {error}"
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return None

    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(work, entries)
        broken = [problem for problem in tracked(results, "augmenting", len(entries)) if problem]
    if broken:
        raise DataError(_listed("could not be written", broken))
    return len(entries)


def _stem(name: str) -> str:
    """Return the name with its suffix as part of the stem: folder/cat_jpg, as a folder may contain cat.jpg and cat.png."""
    path = Path(name)
    return path.with_name(f"{path.stem}_{path.suffix[1:]}").as_posix()


def _encoded(pixels, output: str) -> bytes:
    import simplejpeg
    from PIL import Image

    if output.endswith(".jpg"):
        return simplejpeg.encode_jpeg(pixels, _QUALITY, "RGB", "420")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _listed(problem_kind: str, problems: Sequence[str]) -> str:
    more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
    return f"{len(problems)} images {problem_kind}:\n  " + "\n  ".join(problems[:20]) + more
