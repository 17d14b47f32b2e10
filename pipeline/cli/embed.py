"""`refract embed DATA --model MODEL -o FEATURES`"""

import argparse
import sys
import time
from pathlib import Path

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract embed",
        description="Compute the embedding of each image and keep it in a feature store, which training (model.mode: probe), search and "
        "other commands share. Images that the store holds are not computed again; after an interruption, the same command resumes. "
        "Exit code 1 if no image has an embedding.",
    )
    parser.add_argument(
        "data", metavar="DATA", help="a folder, a CSV or Parquet table, or digits, with or without labels"
    )
    console.add_embedding_model_options(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("features"),
        metavar="FOLDER",
        help="the feature store (default features)",
    )
    parser.add_argument(
        "--policy", metavar="POLICY", help="also embed augmented views by this policy: a preset or a YAML file"
    )
    parser.add_argument(
        "--epochs", type=int, default=1, metavar="N", help="augmented views of each image, with --policy (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the augmented views (default 0)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="number of processes (default: one per GPU, else one per core)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default 64)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default) uses GPUs if available"
    )
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    for name in ("image_size", "epochs", "jobs", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} is not at least 1")
    return console.run("embed", lambda: _embed(args), plugins=args.plugin, resume="the same command resumes")


def _embed(args: argparse.Namespace) -> int:
    from refract.augment import Augmenter
    from refract.pipeline.features.embed import Options, embed, source_name
    from refract.pipeline.features.model import open_model
    from refract.pipeline.features.source import samples_of
    from refract.pipeline.features.store import FeatureStore
    from refract.pipeline.files import printable
    from refract.pipeline.stopping import stop_requests

    samples, labels = samples_of(args.data)
    model = open_model(args.model, args.weights, args.image_size)
    store = FeatureStore(args.output, model.key, model.record)
    augmenter = None
    if args.policy is not None:
        size = (model.preprocess.height, model.preprocess.width)
        how = model.preprocess
        augmenter = Augmenter(
            args.policy, args.seed, size=size, color_profile=how.color_profile, interpolation=how.interpolation
        )
    options = Options(args.device, args.jobs, args.batch_size, augmenter, args.epochs if augmenter else 0)
    started = time.perf_counter()
    with stop_requests("after this shard; finished shards are kept") as stop:
        done = embed(model, samples, labels, store, source_name(args.data), options, stop)
    seconds = time.perf_counter() - started
    stored = sum(key is not None for key in done.keys)
    rate = f" in {seconds:.1f} s, {done.computed / seconds:,.0f} a second" if done.computed else ""
    reused = f"; {done.reused:,} from the store" if done.reused else ""
    print(f"{store.folder}: {stored:,} samples of {args.data}; embeddings computed: {done.computed:,}{rate}{reused}")
    failed = {printable(path): reason for path, reason in done.failed.items()}
    for path, reason in list(failed.items())[:5]:
        print(f"  {path}: {reason}", file=sys.stderr)
    if len(failed) > 5:
        print(f"  and {len(failed) - 5:,} more without an embedding", file=sys.stderr)
    output.result(
        {
            "store": store.folder, "model": model.key, "samples": len(samples), "stored": stored, "computed": done.computed,
            "reused": done.reused, "failed": failed, "seconds": round(seconds, 3),
        }
    )  # fmt: skip
    return 0 if stored else 1
