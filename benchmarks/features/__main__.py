"""Run one stage of the measurements of features. Each stage is a module of this package with `add_arguments(parser)` and `run(args)`."""

import argparse

from benchmarks.features import familiarity, few_images, planted, speed

STAGES = {"familiarity": familiarity, "few-images": few_images, "planted": planted, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features")
    parser.add_argument("--stage", choices=sorted(STAGES), required=True)
    stage, _ = parser.parse_known_args()
    STAGES[stage.stage].add_arguments(parser)
    STAGES[stage.stage].run(parser.parse_args())


if __name__ == "__main__":
    main()
