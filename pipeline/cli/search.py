"""`refract search FEATURES IMAGE…`"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.features.model import EmbeddingModel


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract search",
        description="Find the images of a feature store that are most similar to an image, by the cosine similarity of their embeddings.",
    )
    parser.add_argument(
        "features", type=Path, metavar="FEATURES", help="a feature store, which `refract embed` or a training wrote"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="the images to compare with")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of similar images (default 5)")
    console.add_embedding_model_options(parser, default="the one that wrote the store")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top: {args.top} is not at least 1")
    return console.run("search", lambda: _search(args), plugins=args.plugin)


def _search(args: argparse.Namespace) -> int:
    from refract.pipeline.features.embed import embed_images
    from refract.pipeline.features.search import nearest
    from refract.pipeline.features.store import FeatureStore
    from refract.pipeline.files import printable

    model = _model(args)
    vectors = embed_images(model, args.images)
    results = nearest(FeatureStore(args.features, model.key, model.record), vectors, args.top)
    for image, neighbours in zip(args.images, results, strict=True):
        print(f"{printable(str(image))}:")
        for neighbour in neighbours:
            labels = ";".join(neighbour.sample.labels)
            print(f"  {neighbour.similarity:6.3f}  {neighbour.sample.path}" + (f"  {labels}" if labels else ""))
    output.result(
        {
            printable(str(image)): [
                {
                    "similarity": n.similarity,
                    "path": n.sample.path,
                    "labels": list(n.sample.labels),
                    "split": n.sample.split,
                }
                for n in neighbours
            ]
            for image, neighbours in zip(args.images, results, strict=True)
        }
    )
    return 0


def _model(args: argparse.Namespace) -> "EmbeddingModel":
    """Return the model of the options, or the one that wrote the store. DataError if the store lacks it, or holds several."""
    from refract.pipeline.data.errors import DataError
    from refract.pipeline.features.model import open_model, reopen
    from refract.pipeline.features.store import stored_models

    stored = dict(stored_models(args.features))
    if args.model is not None:
        model = open_model(args.model, args.weights, args.image_size)
        if model.key not in stored:
            raise DataError(
                f"{args.features}: holds no embeddings of {args.model}; run `refract embed DATA --model {args.model} -o {args.features}`"
            )
        return model
    if len(stored) > 1:
        names = ", ".join(
            str(record.get("bundle") or record.get("network") or record.get("run")) for record in stored.values()
        )
        raise DataError(f"{args.features}: holds embeddings of {len(stored)} models ({names}); choose one with --model")
    return reopen(*next(iter(stored.items())))
