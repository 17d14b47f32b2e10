"""`refract augment POLICY IN_DIR OUT_DIR` and `refract augment --replay plans.jsonl IN_DIR OUT_DIR`"""

import argparse
from pathlib import Path

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract augment",
        usage="refract augment POLICY IN_DIR OUT_DIR [options]\n       refract augment --replay plans.jsonl IN_DIR OUT_DIR [options]",
        description="Write augmented copies of the images in a folder, and a plans.jsonl that reproduces the same files.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="POLICY IN_DIR OUT_DIR",
        help="name of a preset or a YAML file; image folder; new folder",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="PLANS",
        help="reproduce the files of this plans.jsonl instead of drawing from a policy",
    )
    parser.add_argument("--copies", type=int, default=1, help="copies of each image (default 1)")
    parser.add_argument(
        "--size", type=int, help="side of the output in pixels (default: the size that the policy gives)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--format", choices=("jpg", "png"), default="jpg", help="format of the output (default jpg, quality 95)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="parallel threads (default 1)")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    if len(args.paths) != (2 if args.replay else 3):
        parser.error(f"got {len(args.paths)} paths; expected IN_DIR OUT_DIR with --replay, else POLICY IN_DIR OUT_DIR")
    for name in ("copies", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is not at least 1")
    return console.run("augment", lambda: _augment(args), plugins=args.plugin)


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
    output.result({"images": count, "folder": target, "plans": target / PLANS})
    return 0
