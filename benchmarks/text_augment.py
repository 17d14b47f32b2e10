"""Measure the gain and the cost of text ops and back-translation: `python -m benchmarks.text_augment --json OUT`.

Refract trains hashed n-grams on sentences of `benchmarks.grammar`, 100 per class. The test set uses words that are rare in training.
The paraphrases come from two tiny translation models that the script trains on other sentences.
"""

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import captions, grammar
from benchmarks.report import environment, write

CHEAP = [
    {"WordDelete": {"p": 0.5, "fraction": 0.15}},
    {"WordSwap": {"p": 0.5, "fraction": 0.15}},
    {"OneOf": {"ops": ["Keyboard", "CharSwap", "CharDelete"], "p": 0.3}},
]
TEXT = "the happy old dog sees a big red car and the small child likes a stone house near the quiet road"
SINGLE = [
    "WordDelete",
    "WordSwap",
    "WordCrop",
    "WordSplit",
    "CharInsert",
    "CharSubstitute",
    "CharSwap",
    "CharDelete",
    "Keyboard",
    "OCR",
    "Spelling",
]
EXTERNAL: list[dict[str, dict[str, str]]] = [
    {"nlpaug.RandomWordAug": {"action": "delete"}}, {"nlpaug.RandomWordAug": {"action": "swap"}}, {"nlpaug.SplitAug": {}},
    {"nlpaug.RandomCharAug": {"action": "insert"}}, {"nlpaug.KeyboardAug": {}}, {"nlpaug.OcrAug": {}}, {"nlpaug.SpellingAug": {}},
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        grammar.train_models(Path(folder) / "models", seed=99)
        speed = throughput(Path(folder) / "models")
        errors_by_policy: dict[str, list[float]] = {
            name: [] for name in ("nothing", "cheap ops", "back-translation", "both")
        }
        for seed in range(args.seeds):
            for name, value in errors(Path(folder), seed, args.epochs).items():
                errors_by_policy[name].append(value)
                print(f"seed {seed}  {name:<18} {value:.1%} wrong", flush=True)
    rows = {
        name: {"mean": statistics.mean(v), "deviation": statistics.stdev(v), "errors": v}
        for name, v in errors_by_policy.items()
    }
    costs = op_costs()
    print(f"{'policy':<18} {'wrong':>7}")
    for name, row in rows.items():
        print(f"{name:<18} {row['mean']:>6.1%} ± {row['deviation']:.1%}")
    batched, alone = speed["batched"], speed["alone"]
    print(
        f"back-translation: {batched:.0f} texts/s in batches of 32, {alone:.1f} alone: {speed['ratio']:.1f} × (goal 8)"
    )
    most, of_nlpaug = max(costs["own"].values()), costs["nlpaug"].values()
    print(f"cheap ops: at most {most:.0f} us a text (goal 200); nlpaug's {min(of_nlpaug):.0f} to {max(of_nlpaug):.0f}")
    if args.json:
        write(
            args.json,
            {
                "environment": environment("torch", "transformers", "nlpaug"),
                "errors": rows,
                "throughput": speed,
                "microseconds": costs,
            },
        )
    return int(speed["ratio"] < 8 or most > 200)


def errors(folder: Path, seed: int, epochs: int) -> dict[str, float]:
    """Return policy → error on the test set."""
    from refract.augment.text.translation import Filter
    from refract.pipeline.config.config import config_from_dict
    from refract.pipeline.data.paraphrasing import Plan, paraphrase
    from refract.pipeline.data.texts import texts_of
    from refract.pipeline.training.run import train

    manifest = captions.write_texts(folder / f"texts{seed}", seed=seed)
    cache = folder / f"texts{seed}" / "p.db"
    plan = Plan(f"{folder}/models/{{from}}-{{to}}", "en", ("de",), 4, Filter(), seed=seed)
    paraphrase(texts_of(manifest, "train"), plan, cache)
    back = [{"BackTranslation": {"p": 0.7, "cache": str(cache)}}]
    error_by_policy = {}
    for name, policy in {"nothing": [], "cheap ops": CHEAP, "back-translation": back, "both": back + CHEAP}.items():
        values = {
            "data": {"source": str(manifest), "batch_size": 32},
            "augment": {"policy": policy},
            "model": {"name": "none"},
            "text": {"name": "hashing"},
            "optim": {"lr": 3e-3},
            "trainer": {"max_epochs": epochs, "seed": seed, "runs_dir": str(folder / "runs")},
            "tracking": {"enabled": False},
        }
        result = train(config_from_dict(values), name=f"{seed}{name.replace(' ', '')}")
        assert result is not None
        error_by_policy[name] = 1 - result.metrics["accuracy"]
    return error_by_policy


def throughput(models: Path, count: int = 256, alone: int = 16) -> dict[str, float]:
    """Return texts per second, back-translated by the same models."""
    from refract.augment.text.translation import BackTranslator

    rng = np.random.default_rng(5)
    texts = [grammar.english(grammar.meaning(rng), rng) for _ in range(count)]
    translator = BackTranslator(f"{models}/en-de", f"{models}/de-en", source="en", via="de", batch=32)
    translator(texts[:32], 0)
    began = time.perf_counter()
    translator(texts, 1)
    batched = count / (time.perf_counter() - began)
    began = time.perf_counter()
    for text in texts[:alone]:
        translator([text], 1)
    single = alone / (time.perf_counter() - began)
    return {"batched": batched, "alone": single, "ratio": batched / single}


def op_costs(rounds: int = 5, texts: int = 300) -> dict[str, dict[str, float]]:
    """Return the microseconds per text of 20 words, drawing included: the median over the rounds."""
    from refract.augment import Augmenter

    def cost(policy: list) -> float:
        augmenter, times = Augmenter(policy), []
        augmenter.text(TEXT, epoch=0, index=0)
        for epoch in range(rounds):
            began = time.perf_counter()
            for index in range(texts):
                augmenter.text(TEXT, epoch=epoch, index=index)
            times.append((time.perf_counter() - began) / texts * 1e6)
        return statistics.median(times)

    random.seed(0)
    return {
        "own": {name: cost([name]) for name in SINGLE},
        "nlpaug": {
            f"{next(iter(entry))} {list(next(iter(entry.values())).values())}": cost([entry]) for entry in EXTERNAL
        },
    }


if __name__ == "__main__":
    sys.exit(main())
