"""`refract paraphrase MANIFEST`"""

import argparse
import re
from pathlib import Path

from refract.pipeline.cli import console

HUB = "Helsinki-NLP/opus-mt-{from}-{to}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract paraphrase",
        description="Translate a manifest's texts into other languages and back, and keep what comes out for the op BackTranslation. "
        "Stopped, it goes on where it was; a text is never translated twice with the same settings.",
    )
    parser.add_argument("manifest", type=Path, help="a CSV or Parquet file with a column text")
    parser.add_argument("--from", dest="source", default="en", metavar="CODE", help="the texts' language (default en)")
    parser.add_argument("--via", default="de", metavar="CODE,…", help="the languages in between (default de)")
    parser.add_argument("--n", type=int, default=3, metavar="N", help="paraphrases by each of them (default 3)")
    parser.add_argument(
        "--model", default=HUB, metavar="NAME",
        help="folder or hub name of a model that translates, in which {from} and {to} stand for the languages; without them one model "
        f"for all of them, as M2M100, NLLB or T5 (default {HUB})",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=Path("paraphrases.db"), metavar="FILE", help="default paraphrases.db"
    )
    parser.add_argument(
        "--split", choices=("train", "all"), default="train", help="whose texts (default train; without splits all)"
    )
    parser.add_argument(
        "--keep", metavar="WORD,…", default="", help="words that must not be lost; or a .txt file with one a line"
    )
    parser.add_argument(
        "--length", type=float, default=0.5, help="shortest, as a share of the text's words; longest, the other way"
    )
    parser.add_argument("--encoder", metavar="NAME", help="folder or hub name of a sentence encoder, for --similar")
    parser.add_argument(
        "--similar", type=float, default=0.7, help="least cosine between text and paraphrase (default 0.7)"
    )
    parser.add_argument(
        "--top-k", type=int, default=10, help="likeliest words of which each is drawn; 1 takes the likeliest"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="above 1 bolder, below 1 more careful")
    parser.add_argument("--max-length", type=int, default=256, help="in the model's tokens; longer texts have none")
    parser.add_argument("--batch", type=int, default=32, help="texts at a time")
    parser.add_argument("--device", default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("top_k", 1), ("max_length", 4), ("batch", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} is not at least {least}")
    if not 0 < args.length <= 1 or not args.temperature > 0:
        parser.error("--length is in (0, 1], --temperature above 0")
    codes = [args.source, *args.via.split(",")]
    if not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", code) for code in codes):
        parser.error(f"--from and --via: {', '.join(codes)} are not codes of languages, as en or eng_Latn")
    if args.source in codes[1:]:
        parser.error(f"--via: {args.source} is the texts' own language")
    return console.run("paraphrase", lambda: _paraphrase(args))


def _paraphrase(args: argparse.Namespace) -> int:
    from refract.augment.text.translation import Filter
    from refract.augment.text.words import NEGATIONS, NUMBERS
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.data.paraphrasing import Plan, paraphrase
    from refract.pipeline.data.texts import texts_of

    keep = [word for word in args.keep.split(",") if word]
    try:
        kept = Filter((NUMBERS, NEGATIONS, *keep), args.length)
    except ValueError as error:
        raise DataError(f"--keep: {error}") from error
    plan = Plan(
        args.model, args.source, tuple(args.via.split(",")), args.n, batch=args.batch, max_length=args.max_length,
        top_k=args.top_k, temperature=args.temperature, device=args.device, seed=args.seed, filter=kept,
        encoder=args.encoder, similar=args.similar,
    )  # fmt: skip
    texts = texts_of(args.manifest, args.split)
    counts = paraphrase(texts, plan, args.cache)
    used = counts.pop("", 0)
    why = "".join(f", {count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    print(f"{used:,} paraphrases of {len(texts):,} texts are used{'; not used' + why.removeprefix(',') if why else ''}")
    print(f"in a policy: - BackTranslation: {{p: 0.5, cache: {args.cache}}}")
    return 0
