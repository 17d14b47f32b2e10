"""`refract augment POLICY IN_DIR OUT_DIR` and `refract augment --replay plans.jsonl IN_DIR OUT_DIR`"""

import argparse
from pathlib import Path

from refract.pipeline.cli import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract augment",
        usage="refract augment POLICY IN_DIR OUT_DIR [options]\n       refract augment --replay plans.jsonl IN_DIR OUT_DIR [options]",
        description="Write augmented copies of the images of a folder, and a plans.jsonl from which the same files can be made again.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="POLICY IN_DIR OUT_DIR", help="a preset's name or YAML file; images; a new folder"
    )
    parser.add_argument(
        "--replay", type=Path, metavar="PLANS", help="make the files of a plans.jsonl again, in place of a policy"
    )
    parser.add_argument("--copies", type=int, default=1, help="of each image (default 1)")
    parser.add_argument("--size", type=int, help="pixels of the results' side (default: as the policy leaves it)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--format", choices=("jpg", "png"), default="jpg", help="of the results (default jpg, quality 95)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="images worked on at a time (default 1)")
    args = parser.parse_args(argv)
    if len(args.paths) != (2 if args.replay else 3):
        parser.error("expected IN_DIR OUT_DIR with --replay, POLICY IN_DIR OUT_DIR without")
    for name in ("copies", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is not at least 1")
    return console.run("augment", lambda: _augment(args))


def _augment(args: argparse.Namespace) -> int:
    from refract.pipeline.data.augmented_copies import PLANS, draw_plans, read_plans, write_copies

    source, target = (Path(path) for path in args.paths[-2:])
    if args.replay:
        entries = read_plans(args.replay)
    else:
        entries = draw_plans(
            args.paths[0], source, copies=args.copies, seed=args.seed, size=args.size, kind=args.format
        )
    count = write_copies(entries, source, target, jobs=args.jobs)
    print(f"wrote {count} images and {PLANS} to {target}")
    return 0
