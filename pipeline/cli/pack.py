"""`refract pack SOURCE FOLDER`"""

import argparse
import sys
from pathlib import Path

from refract import output
from refract.models.credentials import masked
from refract.pipeline import console
from refract.remote.address import is_remote


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract pack",
        description="Write a data set to a few large tars (WebDataset), which `refract train` reads as it reads the data set itself: the "
        "same samples in the same order. With --resize, the images are smaller, and training decodes them faster. After an "
        "interruption, the same command resumes.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="the data, as data.source of a config; or a config (.yaml): its data as training reads them, checked, with the labels of "
        "data.labels and all splits",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a new folder for the tars")
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="reduce larger images to this shorter side, as JPEG (default: images keep their bytes)",
    )
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of these JPEGs, 1 to 100 (default 90)")
    parser.add_argument(
        "--raw", action="store_true", help="store decoded images as BMP: ten times the size, read faster"
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples in a tar (default 1000)")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    for name in ("resize", "shard_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} is not at least 1")
    if not 1 <= args.quality <= 100:
        parser.error(f"--quality: {args.quality} is not in 1 to 100")
    if is_remote(args.folder):
        parser.error(f"FOLDER: {masked(args.folder)} is a URL; name a local folder, and copy the finished pack")
    return console.run("pack", lambda: _pack(args), plugins=args.plugin, resume="the same command resumes")


def _pack(args: argparse.Namespace) -> int:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.data.manifest import load_manifest
    from refract.pipeline.data.pack import StoredImages, pack
    from refract.pipeline.data.prepare import prepare_data
    from refract.pipeline.stopping import stop_requests

    fingerprint, next_step = "", f"set data.source: {args.folder}"
    if Path(args.source).suffix.lower() in (".yaml", ".yml"):
        config = load_config(Path(args.source))
        manifest, identity = prepare_data(config)
        fingerprint = identity["fingerprint"]
        next_step += "" if config.data.labels is None else ", and remove data.labels"
    else:
        manifest = load_manifest(args.source, to_train=False)
    folder = Path(args.folder)
    images = StoredImages(args.resize, args.quality, args.raw)
    with stop_requests("after this shard; finished shards are kept") as stop:
        record, written = pack(manifest, images, folder, stop, shard_size=args.shard_size, fingerprint=fingerprint)
    undecodable = sum(shard.kept for shard in record.shards)
    size = sum(shard.bytes for shard in record.shards)
    reused = f"; {len(record.shards) - written:,} of them complete before" if written < len(record.shards) else ""
    print(f"{folder}: {record.samples:,} samples, {size / 1e6:,.1f} MB, tars: {len(record.shards):,}{reused}")
    if undecodable:
        print(f"images that cannot be decoded, stored as they are: {undecodable:,}", file=sys.stderr)
    print(f"next:     {next_step}")
    output.result(
        {
            "pack": folder, "samples": record.samples, "bytes": size, "shards": len(record.shards), "written": written,
            "undecodable": undecodable, "fingerprint": fingerprint or None,
        }
    )  # fmt: skip
    return 0
