"""Which fraction of flipped labels the queue of likely label errors shows first, compared with cleanlab on the same predictions.

A fraction of the training labels is replaced by another class, drawn at random. The predictions are out-of-fold, by a probe on embeddings:
in one pass, and in the two passes of a review. Each ranking lists all images; recall is the fraction of the flips among the first 5 and
10 % of all images. The accuracies are those of a probe on the test split: trained on the flipped labels, after the first 10 % of our list
were reviewed and corrected, and trained on the true labels.
"""

import argparse
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.loop.embedded import Split, accuracy, chosen, embedded, part
from benchmarks.report import environment, write
from refract.pipeline.review.predict import out_of_fold, robust_out_of_fold
from refract.pipeline.review.queues.label_errors import doubt

NOISE = (0.05, 0.1)
REVIEWED = (0.05, 0.1)
OURS = "refract, two passes"
"""The ranking of a review."""


def rankings(probabilities: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
    """Return name → indices of all images, the likeliest errors first."""
    targets = np.eye(probabilities.shape[1], dtype=bool)[given]
    orders = {"refract": np.argsort(-doubt(probabilities, targets, multilabel=False), kind="stable")}
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return orders
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        scores = get_label_quality_scores(given, probabilities, method=method)
        orders[f"cleanlab {method}"] = np.argsort(scores, kind="stable")
    return orders


def measured(labels: tuple[str, ...], train: Split, test: Split, noise: float, seed: int) -> dict[str, Any]:
    """Flip labels, rank the images and correct the first ones. Returns recalls by ranking, and accuracies."""
    rng = np.random.default_rng([seed, round(1000 * noise)])
    flipped = rng.permutation(len(train.truth))[: round(noise * len(train.truth))]
    given = train.truth.copy()
    given[flipped] = (given[flipped] + rng.integers(1, len(labels), len(flipped))) % len(labels)
    noisy = part(train.vectors, given, len(labels))
    choice = chosen(noisy, seed)
    predictions = {
        "one pass": out_of_fold(choice, noisy, train.samples, train.contents, multilabel=False),
        "two passes": robust_out_of_fold(choice, noisy, train.samples, train.contents, multilabel=False),
    }
    orders = {
        f"{name}, {passes}": order
        for passes, probabilities in predictions.items()
        for name, order in rankings(probabilities, given).items()
    }
    wrong = np.zeros(len(given), bool)
    wrong[flipped] = True
    recalls = {
        name: {
            str(fraction): float(wrong[order[: round(fraction * len(order))]].sum() / wrong.sum())
            for fraction in REVIEWED
        }
        for name, order in orders.items()
    }
    reviewed = orders[OURS][: round(REVIEWED[-1] * len(given))]
    corrected = given.copy()
    corrected[reviewed] = train.truth[reviewed]
    accuracies = {
        name: accuracy(part(train.vectors, values, len(labels)), test, choice)
        for name, values in (("before", given), ("after", corrected), ("clean", train.truth))
    }
    return {"noise": noise, "seed": seed, "choice": choice, "recall": recalls, "accuracy": accuracies}


def main(args: argparse.Namespace) -> int:
    """Run the stage, print and write its result. Returns 1 if a ranking of cleanlab finds more."""
    labels, train, test = embedded(args.data, args.store)
    print(f"{len(train.truth):,} training and {len(test.truth):,} test images, {len(labels)} classes")
    rows = [measured(labels, train, test, noise, seed) for noise in NOISE for seed in range(args.seeds)]
    table: list[dict[str, Any]] = []
    for noise in NOISE:
        same = [row for row in rows if row["noise"] == noise]
        for name in same[0]["recall"]:
            means = {
                fraction: round(mean(row["recall"][name][fraction] for row in same), 4)
                for fraction in map(str, REVIEWED)
            }
            table.append({"noise": noise, "ranking": name, "recall": means})
            print(
                f"{noise:.0%} flipped, {name:40} "
                + "  ".join(f"{recall:.3f} of them in {float(f):.0%}" for f, recall in means.items())
            )
        means = {name: round(mean(row["accuracy"][name] for row in same), 4) for name in same[0]["accuracy"]}
        table.append({"noise": noise, "accuracy": means})
        print(f"{noise:.0%} flipped, accuracy {means}")
    if args.json:
        facts = {"data": args.data.name, "train": len(train.truth), "test": len(test.truth), "seeds": args.seeds}
        write(
            args.json, {**environment("torch", "cleanlab"), "stage": args.stage, **facts, "table": table, "runs": rows}
        )
    best = {
        (row["noise"], fraction): max(recall for other in table if other["noise"] == row["noise"] and "recall" in other
                                      for recall in [other["recall"][fraction]])
        for row in table if "recall" in row for fraction in row["recall"]
    }  # fmt: skip
    ours = [row for row in table if row.get("ranking") == OURS]
    return 0 if all(row["recall"][f] >= best[row["noise"], f] - 0.005 for row in ours for f in row["recall"]) else 1
