"""`refract review CONFIG|RUN|BUNDLE`"""

import argparse
from pathlib import Path

from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract review",
        description="Review labels in the browser: likely label errors, near-duplicates with different labels, images that a server "
        "captured, and new images. Decisions are recorded in a label history, which training applies (docs/review.md).",
    )
    parser.add_argument(
        "subject", metavar="CONFIG|RUN|BUNDLE", help="a config whose network has weights, or a training's result"
    )
    parser.add_argument(
        "--data", metavar="SOURCE", help="review this data set (default: that of the config or of the training)"
    )
    parser.add_argument(
        "--labels",
        metavar="DATABASE",
        help="the label history, created if missing (default: data.labels, else labels.db next to the data)",
    )
    parser.add_argument("--captured", type=Path, metavar="DIR", help="images that `refract serve --sample DIR` stored")
    parser.add_argument(
        "--feedback", type=Path, metavar="DIR", help="feedback that `refract serve --feedback-dir DIR` stored"
    )
    parser.add_argument("--unlabelled", metavar="SOURCE", help="new images without labels: a folder or a table")
    parser.add_argument("--challenger", metavar="RUN|BUNDLE", help="also show images on which this bundle disagrees")
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="DIR",
        help="copy added captured images here (default: collected/ next to the label history)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; other than loopback needs --keys (default 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8100, help="port; 0 takes a free one (default 8100)")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys of the reviewers, a line each: KEY  # NAME")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    return console.run("review", lambda: _review(args), plugins=args.plugin)


def _review(args: argparse.Namespace) -> int:
    from refract.pipeline.review.server import serve_review
    from refract.pipeline.review.start import ReviewOptions, start_review

    options = ReviewOptions(
        args.subject,
        args.data,
        args.labels,
        args.captured,
        args.feedback,
        args.unlabelled,
        args.challenger,
        args.collect,
    )
    return serve_review(lambda: start_review(options), host=args.host, port=args.port, keys=args.keys)
