"""`refract train CONFIG [--section.key value …]`"""

import sys

from pipeline.commands import console


def main(argv: list[str]) -> int:
    from pipeline.config import help_text

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: refract train CONFIG.yaml [--section.key value …]\n")
        print("Train as the config says; any key can be set on the command line. Everything goes below RUNS_DIR/NAME/,")
        print("the bundle to RUNS_DIR/NAME/bundle/. Keys, with their defaults:\n")
        print(help_text())
        return 0 if argv else 2
    if argv[0].startswith("--"):
        print(f"refract train: the config file comes first, then options; got {argv[0]}", file=sys.stderr)
        return 2
    return console.run("train", lambda: _train(argv[0], argv[1:]))


def _train(path: str, overrides: list[str]) -> int:
    from pathlib import Path

    from pipeline.config import load_config
    from pipeline.training import train

    config = load_config(path, overrides)
    result = train(config, name=Path(path).stem)
    if result is None:
        return 0
    print("hold-out: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    print(f"run:      {result.run_dir}/ (config.yaml, splits.csv, preview.png, curves.png, checkpoints/)")
    print(f"bundle:   {result.bundle}")
    if result.version:
        print(f"registry: models:/{config.tracking.model_name}@{config.tracking.alias} is version {result.version}")
    if config.tracking.enabled:
        from pipeline.tracking import tracking_uri

        print(f"MLflow:   {console.bin_prefix()}mlflow ui --backend-store-uri {tracking_uri(config.tracking)}")
    here = console.bin_prefix()
    print(f"next:     {here}refract predict {result.bundle} PICTURE   or   {here}refract serve {result.bundle}")
    return 0
