"""`refract init FOLDER -o photos.yaml`"""

import argparse
import sys
from pathlib import Path

from pipeline.commands import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract init",
        description="Look at the pictures and write a commented config that trains on them as it is.",
    )
    parser.add_argument(
        "source", help="a folder (CLASS/… or train|val|test/CLASS/…), a CSV or Parquet manifest, or `digits`"
    )
    parser.add_argument("-o", "--output", type=Path, help="the config to write (default: NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    output = args.output or Path(f"{Path(args.source).stem or 'refract'}.yaml")
    if output.exists() and not args.force:
        print(
            f"refract init: {output} exists already; give another name with -o, or --force to replace it",
            file=sys.stderr,
        )
        return 2
    return console.run("init", lambda: _init(args.source, output))


def _init(source: str, output: Path) -> int:
    from pipeline.data.manifest import load_manifest
    from pipeline.files import write_atomically
    from pipeline.suggest import survey, write_config

    manifest = load_manifest(source)
    found = survey(manifest)
    write_atomically(output, write_config(manifest, found).encode())
    counts = manifest.counts()
    pictured = any(sample.pictured for sample in manifest.samples)
    what = f"pictures ({found.sizes})" if pictured else "texts"
    print(f"{source}: {manifest.task}, {len(manifest.labels)} labels, {len(manifest.samples):,} {what}")
    print(f"  smallest class: {min(counts, key=counts.__getitem__)} ({min(counts.values()):,}), "
          f"largest: {max(counts, key=counts.__getitem__)} ({max(counts.values()):,})")  # fmt: skip
    single = [label for label, count in counts.items() if count == 1]
    if single:
        print(
            f"  note: classes with one sample, as {single[0]}, cannot be learned and measured: add samples or take them out"
        )
    for note in found.notes:
        print(f"  {note}")
    print(f"wrote {output}")
    look = f"refract preview {output} -o grid.png   then   " if pictured else ""
    print(f"next: {look}refract train {output}")
    return 0
