"""`refract profile CONFIG`"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.training.profile import Profile


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract profile",
        usage="refract profile CONFIG.yaml [--steps N] [--trace FILE] [--no-trial] [--section.key value …]",
        description="Time the stages of some training steps, name the slowest one, and try the setting that should lift it. "
        "Writes no run.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the training")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="timed steps (default 50)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the steps as a Chrome trace, for Perfetto")
    parser.add_argument("--no-trial", action="store_true", help="name the setting to try, but do not try it")
    args, overrides = parser.parse_known_args(argv)
    if args.steps < 1:
        parser.error(f"--steps: {args.steps} is not at least 1")
    return console.run("profile", lambda: _profile(args, overrides))


def _profile(args: argparse.Namespace, overrides: list[str]) -> int:
    import dataclasses

    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.bottleneck import explanation, proposals
    from refract.pipeline.training.profile import profile, write_trace

    config = load_config(args.config, overrides)
    measured = profile(config, steps=args.steps)
    _show(measured)
    if args.trace is not None:
        write_trace(measured, args.trace)
        print(f"wrote {args.trace}", file=sys.stderr)
    print(f"bottleneck  {explanation(measured)}")
    tried: Profile | None = None
    options = proposals(measured, config)
    for proposal in options:
        print(
            f"try         {proposal.options or proposal.reason}" + (f": {proposal.reason}" if proposal.setting else "")
        )
    first = next((proposal for proposal in options if proposal.setting), None)
    if first is not None and not args.no_trial:
        tried = profile(config.changed(first.setting), steps=args.steps)
        gain = tried.images_per_second / measured.images_per_second
        print(
            f"measured    {first.options}: {tried.images_per_second:,.0f} images/s in place of "
            f"{measured.images_per_second:,.0f}, {gain:.2f} times as many"
        )
    output.result(
        {
            **dataclasses.asdict(measured),
            "bottleneck": measured.bottleneck,
            "images_per_second": measured.images_per_second,
            "proposals": [dataclasses.asdict(proposal) for proposal in options],
            "tried": None
            if first is None or tried is None
            else {"setting": first.setting, "images_per_second": tried.images_per_second},
        }
    )
    return 0


def _show(measured: "Profile") -> None:
    from refract.pipeline.training.profile import INPUT_STAGES, STEP_STAGES

    print(f"{measured.step:.1f} ms a step of {measured.batch_size} images: {measured.images_per_second:,.0f} images/s")
    print(f"{measured.workers} loader processes, {measured.cores} cores\n")
    print("stage        ms a step")
    for name in STEP_STAGES:
        print(f"{name:<12} {measured.stages[name]:9.2f}")
    print("\ninput        ms a batch, on one core")
    for name in INPUT_STAGES:
        slowest = "" if name != "augment" or measured.slowest is None else f"   slowest: {measured.slowest[0]}"
        print(f"{name:<12} {measured.stages[name]:9.2f}{slowest}")
    print()
