"""`refract preview CONFIG_OR_FOLDER -o grid.png`"""

import argparse
import io
from pathlib import Path

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract preview",
        description="Draw one row per image: the original and its augmented variants, with the drawn ops below each.",
    )
    parser.add_argument("source", help="config (.yaml), image, or folder of images")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("preview.png"), help="PNG file to write (default preview.png)"
    )
    parser.add_argument(
        "--policy",
        help="name of a preset or a YAML file, instead of the config's policy (default for images: imagenet)",
    )
    parser.add_argument(
        "--size", type=int, help="side of the variants in pixels, instead of the config's (default for images: 224)"
    )
    parser.add_argument("--rows", type=int, default=6, help="number of images (default 6)")
    parser.add_argument("--variants", type=int, default=6, help="variants of each image (default 6)")
    parser.add_argument("--seed", type=int, help="random seed, instead of the config's")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    for name in ("rows", "variants"):
        if not 1 <= getattr(args, name) <= 100:
            parser.error(f"--{name}: {getattr(args, name)} is not in 1…100")
    return console.run("preview", lambda: _preview(args), plugins=args.plugin)


def _preview(args: argparse.Namespace) -> int:
    from refract.augment import Augmenter
    from refract.pipeline.files import write_atomically
    from refract.pipeline.preview import preview_grid

    policy, seed, size, reading, images = (
        _from_config(args) if args.source.endswith((".yaml", ".yml")) else _from_images(args)
    )
    augmenter = Augmenter(
        args.policy or policy,
        seed if args.seed is None else args.seed,
        size=args.size or size,
        **reading,
    )
    grid = preview_grid(images, augmenter, variants=args.variants)
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    write_atomically(args.output, buffer.getvalue())
    output.result({"file": args.output, "images": len(images), "variants": args.variants})
    print(f"wrote {args.output}: {len(images)} images × {args.variants} variants")
    return 0


def _from_config(args: argparse.Namespace):
    from refract.pipeline.config.config import load_config
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.preview import shown_samples
    from refract.plugins import load

    config = load_config(args.source)
    load(config.plugins)
    manifest = load_manifest(config.data.source, config.data.task)
    data = config.data
    return (
        config.augment.policy,
        config.trainer.seed,
        data.sides(),
        {"color_profile": data.color_profile, "interpolation": data.interpolation},
        shown_samples(manifest, args.rows),
    )


def _from_images(args: argparse.Namespace):
    from refract.pipeline.data import storage
    from refract.pipeline.data.image_paths import listed_images
    from refract.pipeline.preview import Shown, spread
    from refract.remote.address import path_or_url

    files = [str(file) for file in listed_images([path_or_url(args.source)])]
    images = [Shown(Path(files[i]).stem, storage.read(files[i]), i) for i in spread(len(files), args.rows)]
    return "imagenet", 0, 224, {"color_profile": "convert"}, images
