"""`refract explain POLICY IMAGE`"""

import argparse
from pathlib import Path

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract explain",
        description="Show the steps that a policy draws for one image, the fused passes, and the time of each pass.",
    )
    parser.add_argument("policy", help="name of a preset, or a YAML file")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument(
        "--size", type=int, help="side of the output in pixels (default: the size that the policy gives)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--epoch", type=int, default=0, help="epoch whose draws are shown (default 0)")
    parser.add_argument(
        "--index",
        type=int,
        default=0,
        help="index of the image in its data set; each index draws a different plan (default 0)",
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed runs; the median is shown (default 30)")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats: {args.repeats} is not at least 1")
    return console.run("explain", lambda: _explain(args), plugins=args.plugin)


def _explain(args: argparse.Namespace) -> int:
    import dataclasses

    import cv2

    from refract.augment import Augmenter, image_size
    from refract.augment.executors.explain import explain

    cv2.setNumThreads(1)
    data = args.image.read_bytes()
    augmenter = Augmenter(args.policy, args.seed, size=args.size)
    plan = augmenter.draw(image_size(data), epoch=args.epoch, index=args.index)
    print(f"{args.image}: {plan.size[0]}×{plan.size[1]}, seed {args.seed}, epoch {args.epoch}, index {args.index}\n")
    print("drawn")
    for step in plan.steps:
        print(f"  {step}")
    stages = explain(plan, data, repeats=args.repeats)
    print("\nexecuted, on one thread")
    for stage in stages:
        ops = " + ".join(step.op for step in stage.steps)
        print(f"  {1e6 * stage.seconds:8.0f} µs  {stage.name}: {', '.join(filter(None, (ops, stage.detail)))}")
    total = sum(stage.seconds for stage in stages)
    print(f"  {1e6 * total:8.0f} µs  in total")
    if not plan.exact and len(stages) - 1 < len(plan.steps):
        each = explain(dataclasses.replace(plan, exact=True), data, repeats=args.repeats)
        print(f"  {1e6 * sum(stage.seconds for stage in each):8.0f} µs  without fusion (exact: true)")
    passes = [
        {"name": stage.name, "steps": [str(step) for step in stage.steps], "seconds": stage.seconds} for stage in stages
    ]
    output.result(
        {"image": args.image, "steps": [str(step) for step in plan.steps], "passes": passes, "seconds": total}
    )
    if augmenter.mixes:
        print("\nMixUp and CutMix act on a batch, not on one image, and are not timed.")
    return 0
