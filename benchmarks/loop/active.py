"""Active learning with the queue of unlabelled images, compared with random images and with uncertainty alone.

Each run starts with ROUND random labels. In each of ROUNDS rounds a probe on embeddings is fitted, and a strategy chooses ROUND further
images of the training split, whose labels are revealed. The area under the curve is the mean test accuracy over all rounds; its difference
from random images is paired by the seed, with a 95 % interval by Student's t.
"""

import argparse
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.loop.embedded import Split, accuracy, chosen, embedded, part
from benchmarks.report import environment, write
from refract.pipeline.features.heads import fit_candidate, outputs
from refract.pipeline.features.index import normalised
from refract.pipeline.review.queues.unlabelled import diverse, uncertainty_of

ROUNDS, ROUND = 20, 50
STRATEGIES = ("random", "uncertainty", "refract")


def chosen_rows(strategy: str, rng: np.random.Generator, vectors: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Choose ROUND rows of unlabelled images. vectors: (N, D), of length 1; uncertainty: (N,)."""
    if strategy == "random":
        return rng.permutation(len(vectors))[:ROUND]
    if strategy == "uncertainty":
        return np.argsort(-uncertainty, kind="stable")[:ROUND]
    return diverse(vectors, uncertainty, ROUND)


def curve(strategy: str, labels: tuple[str, ...], train: Split, test: Split, seed: int) -> list[float]:
    """Return the test accuracy before each round and after the last one."""
    rng = np.random.default_rng(seed)
    units = normalised(train.vectors)
    known = np.zeros(len(train.truth), bool)
    known[rng.permutation(len(known))[:ROUND]] = True
    accuracies = []
    for number in range(ROUNDS + 1):
        labelled = part(train.vectors[known], train.truth[known], len(labels))
        choice = chosen(labelled, seed)
        accuracies.append(accuracy(labelled, test, choice))
        if number < ROUNDS:
            head = fit_candidate("probe", choice, labelled, multilabel=False)
            rows = np.flatnonzero(~known)
            probabilities = outputs(head, train.vectors[rows]).softmax(dim=1).numpy()
            picked = chosen_rows(strategy, rng, units[rows], uncertainty_of(probabilities, multilabel=False))
            known[rows[picked]] = True
    return accuracies


def main(args: argparse.Namespace) -> int:
    """Run the stage, print and write its result."""
    from scipy.stats import t

    labels, train, test = embedded(args.data, args.store)
    print(f"{len(train.truth):,} training and {len(test.truth):,} test images, {len(labels)} classes")
    curves = {
        strategy: [curve(strategy, labels, train, test, seed) for seed in range(args.seeds)] for strategy in STRATEGIES
    }
    areas = {strategy: [mean(one) for one in runs] for strategy, runs in curves.items()}
    rows: list[dict[str, Any]] = []
    for strategy in STRATEGIES:
        gains = np.array(areas[strategy]) - np.array(areas["random"])
        spread = t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
        row = {
            "strategy": strategy, "area": round(mean(areas[strategy]), 4), "gain": round(float(gains.mean()), 4),
            "low": round(float(gains.mean() - spread), 4), "high": round(float(gains.mean() + spread), 4),
            "last": round(mean(run[-1] for run in curves[strategy]), 4),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{strategy:12} area {row['area']:.4f}, against random {row['gain']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}), "
            f"after {ROUND * (ROUNDS + 1)} labels {row['last']:.4f}"
        )
    if args.json:
        facts = {"data": args.data.name, "rounds": ROUNDS, "labels_a_round": ROUND, "seeds": args.seeds}
        write(
            args.json,
            {**environment("torch", "scikit-learn"), "stage": args.stage, **facts, "rows": rows, "curves": curves},
        )
    return 0
