"""`refract paraphrase MANIFEST`"""

import argparse
import re
from pathlib import Path

from refract import output
from refract.pipeline import console

HUB = "Helsinki-NLP/opus-mt-{from}-{to}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract paraphrase",
        description="Translate a manifest's texts into other languages and back, and cache the paraphrases for the op BackTranslation. "
        "After an interruption, the same command resumes. A text is translated once per settings.",
    )
    parser.add_argument("manifest", type=Path, help="CSV or Parquet file with a column text")
    parser.add_argument(
        "--from", dest="source", default="en", metavar="CODE", help="language of the texts (default en)"
    )
    parser.add_argument("--via", default="de", metavar="CODE,…", help="intermediate languages (default de)")
    parser.add_argument(
        "--n", type=int, default=3, metavar="N", help="paraphrases per intermediate language (default 3)"
    )
    parser.add_argument(
        "--model", default=HUB, metavar="NAME",
        help="folder or hub name of a translation model; {from} and {to} are replaced by the languages. A name without them is one "
        f"model for all languages, such as M2M100, NLLB or T5 (default {HUB})",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=Path("paraphrases.db"), metavar="FILE", help="cache file (default paraphrases.db)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "all"),
        default="train",
        help="split of the texts (default train; all texts of a manifest without splits)",
    )
    parser.add_argument(
        "--keep", metavar="WORD,…", default="", help="protected words, or a .txt file with one word per line"
    )
    parser.add_argument(
        "--length",
        type=float,
        default=0.5,
        help="minimum ratio of the word counts of the shorter and the longer text, in (0, 1] (default 0.5)",
    )
    parser.add_argument("--encoder", metavar="NAME", help="folder or hub name of a sentence encoder, for --similar")
    parser.add_argument(
        "--similar", type=float, default=0.7, help="minimum cosine similarity of text and paraphrase (default 0.7)"
    )
    parser.add_argument(
        "--top-k", type=int, default=10, help="number of most likely tokens to sample from; 1 is greedy (default 10)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="sampling temperature, above 0; higher is more diverse (default 1)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=256,
        help="longest text in the model's tokens; longer texts get no paraphrase (default 256)",
    )
    parser.add_argument("--batch", type=int, default=32, help="texts per batch (default 32)")
    parser.add_argument("--device", default="auto", help="auto (default) uses a GPU if available")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    args = parser.parse_args(argv)
    for name, minimum in (("n", 1), ("top_k", 1), ("max_length", 4), ("batch", 1), ("seed", 0)):
        if getattr(args, name) < minimum:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} is not at least {minimum}")
    if not 0 < args.length <= 1:
        parser.error(f"--length: {args.length} is not in (0, 1]")
    if not args.temperature > 0:
        parser.error(f"--temperature: {args.temperature} is not above 0")
    codes = [args.source, *args.via.split(",")]
    if not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", code) for code in codes):
        parser.error(f"--from and --via: {', '.join(codes)} are not language codes such as en or eng_Latn")
    if args.source in codes[1:]:
        parser.error(f"--via: {args.source} is the language of the texts; choose another")
    return console.run("paraphrase", lambda: _paraphrase(args))


def _paraphrase(args: argparse.Namespace) -> int:
    from refract.augment.text.translation import Filter
    from refract.augment.text.words import NEGATIONS, NUMBERS
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.data.paraphrasing import Plan, paraphrase
    from refract.pipeline.data.texts import texts_of

    protected_words = [word for word in args.keep.split(",") if word]
    try:
        paraphrase_filter = Filter((NUMBERS, NEGATIONS, *protected_words), args.length)
    except ValueError as error:
        raise DataError(f"--keep: {error}") from error
    plan = Plan(
        args.model, args.source, tuple(args.via.split(",")), args.n, batch=args.batch, max_length=args.max_length,
        top_k=args.top_k, temperature=args.temperature, device=args.device, seed=args.seed, filter=paraphrase_filter,
        encoder=args.encoder, similar=args.similar,
    )  # fmt: skip
    texts = texts_of(args.manifest, args.split)
    counts = paraphrase(texts, plan, args.cache)
    used = counts.pop("", 0)
    reasons = "".join(f", {count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    print(
        f"{used:,} paraphrases of {len(texts):,} texts are used{'; not used' + reasons.removeprefix(',') if reasons else ''}"
    )
    output.result({"texts": len(texts), "used": used, "not_used": counts, "cache": args.cache})
    print(f"in a policy: - BackTranslation: {{p: 0.5, cache: {args.cache}}}")
    return 0
