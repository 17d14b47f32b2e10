"""`refract init FOLDER -o photos.yaml`"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.suggest import Proposal, Survey

ROWS, VARIANTS = 4, 5
"""Rows and variants of the preview grid."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract init",
        description="Inspect a data set and write a commented config that is ready to train on it.",
    )
    parser.add_argument(
        "source", help="data set: a folder (CLASS/… or train|val|test/CLASS/…), a CSV or Parquet manifest, or `digits`"
    )
    parser.add_argument("-o", "--output", type=Path, help="config file to write (default: SOURCE.yaml)")
    parser.add_argument("--force", action="store_true", help="replace an existing config file")
    parser.add_argument(
        "--model.name", dest="name", metavar="NETWORK", help="architecture, as model.name of `refract train`"
    )
    parser.add_argument(
        "--model.weights", dest="weights", metavar="WEIGHTS",
        help="pretrained weights: a .safetensors or .pth file, a bundle's folder, or `default`",
    )  # fmt: skip
    args = parser.parse_args(argv)
    config = args.output or Path(f"{Path(args.source).stem or 'refract'}.yaml")
    if config.exists() and not args.force:
        print(
            f"refract init: {config} exists already; choose another name with -o, or replace it with --force",
            file=sys.stderr,
        )
        return 2
    return console.run("init", lambda: _init(args.source, config, args.name, args.weights))


def _init(source: str, config: Path, name: str | None, weights: str | None) -> int:
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.files import write_atomically
    from refract.pipeline.suggest import check_start, choice_table, config_text, propose, take_survey

    manifest = load_manifest(source)
    start = check_start(name, weights, len(manifest.labels))
    survey = take_survey(manifest)
    proposal = propose(survey, start)
    write_atomically(config, config_text(proposal, survey).encode())
    kind = f"images ({survey.sizes} pixels)" if survey.images else "texts"
    counts = survey.counts
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    print(f"{source}: {survey.task}, {len(survey.labels)} labels, {survey.samples:,} {kind}")
    if counts[smallest] == counts[largest]:
        print(f"  {counts[smallest]:,} samples in each class")
    else:
        print(f"  smallest class: {smallest} ({counts[smallest]:,}), largest: {largest} ({counts[largest]:,})")
    print(choice_table(proposal.from_data()))
    for note in proposal.notes:
        print(f"  {note}")
    print(f"wrote {config}")
    grid = _preview(manifest, proposal, config) if survey.images else None
    if grid is not None:
        print(f"wrote {grid}: a preview of the training images; check it first")
    if not output.is_quiet():
        print(f"next: {_next_step(survey, config)}")
    facts = {"task": survey.task, "samples": survey.samples, "labels": dict(counts), "notes": list(proposal.notes)}
    output.result({"config": config, "preview": grid, **facts, "next": _next_step(survey, config)})
    return 0


def _next_step(survey: "Survey", config: Path) -> str:
    command = f"refract train {shlex.quote(str(config))}"
    if survey.refused:
        return f"fix the data as noted above, then {command}"
    if survey.unreadable:
        return f"fix the unreadable images, or skip them: {command} --data.on_bad_file skip"
    return command


def _preview(manifest: "Manifest", proposal: "Proposal", config: Path) -> Path | None:
    """Write the preview grid next to the config as NAME.preview.png. Returns None if no image can be read."""
    import io

    from refract.augment import Augmenter
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.files import write_atomically
    from refract.pipeline.preview import preview_grid, shown_samples, spread

    try:
        readable = [shown for shown in shown_samples(manifest, 3 * ROWS) if _decodes(shown.data)]
    except DataError:
        return None
    if not readable:
        return None
    augmenter = Augmenter(
        proposal.value("augment.policy"), 0, size=proposal.value("data.image_size"), color_profile="convert"
    )
    buffer = io.BytesIO()
    preview_grid([readable[i] for i in spread(len(readable), ROWS)], augmenter, variants=VARIANTS).save(buffer, "PNG")
    grid = config.with_suffix(".preview.png")
    write_atomically(grid, buffer.getvalue())
    return grid


def _decodes(data: bytes) -> bool:
    from refract.augment import ImageError, decode

    try:
        decode(data)
    except ImageError:
        return False
    return True
