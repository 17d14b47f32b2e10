"""Average the weights of runs of one network, and evaluate and package the average as a training does.

Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time", arXiv:2203.05482. Deviation: the statistics of batch norms are recomputed, as the paper averages networks without them.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from refract.augment import Augmenter
from refract.models.bundle.bundle import Bundle, BundleInfo, load_bundle
from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.data.datamodule import ImageDataModule
from refract.pipeline.data.manifest import DataError
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.data.splits import write_splits
from refract.pipeline.evaluation.assess import write_predictions
from refract.pipeline.evaluation.compare import against, flattened, read_run
from refract.pipeline.evaluation.measures import Difference
from refract.pipeline.files import write_atomically
from refract.pipeline.inference.scoring import preprocess_of
from refract.pipeline.tracking.model_card import read_facts, write_card
from refract.pipeline.training.averages import AverageScorer, WeightSum
from refract.pipeline.training.device import choose_device
from refract.pipeline.training.fit import Assembly
from refract.pipeline.training.ranks import Ranks
from refract.pipeline.training.run import evaluate, package
from refract.pipeline.training.run_directory import stored_config, write_config
from refract.plugins import load

log = logging.getLogger(__name__)

METHODS = ("greedy", "uniform")

RECORD = "soup.json"
"""The file of the average's folder with its runs, their scores and the comparison with the best run."""


@dataclass(frozen=True)
class Member:
    """A run that was considered. score: its own on the validation set; averaged: whether the average has it; with_it: score of the average
    with this run, None for the first run and for `uniform`."""

    run: Path
    score: float
    averaged: bool
    with_it: float | None = None


@dataclass(frozen=True)
class Soup:
    """The average of runs.

    run_dir: its folder; members: the best first; metric: the metric of the scores; score: the score of the average on the validation set;
    metrics: on the test set; compared: metric of the difference; difference: the difference of the average to the best run, on `count` test
    images.
    """

    run_dir: Path
    method: str
    members: list[Member]
    metric: str
    score: float
    metrics: dict[str, float]
    compared: str
    difference: Difference
    count: int


def make_soup(runs: Sequence[Path], target: Path, method: str = "greedy") -> Soup:
    """Average the weights of runs, and write the average's folder with its bundle, report and comparison with the best run.

    runs: folders of finished runs with the same data, splits, network and preprocessing. method: `greedy` starts with the run of the best
    validation score, and adds the others in the order of their scores where the score of the average does not fall; `uniform` averages
    all. The folder appears when it is complete.
    Raises ConfigError for a target that exists or runs that differ, BundleError for a damaged bundle, and DataError if the data changed.
    """
    if target.exists():
        raise ConfigError(f"-o: {target} exists already; choose another name or remove it")
    configs = [stored_config(run) for run in runs]
    load(tuple(dict.fromkeys(name for config in configs for name in config.plugins)))
    predictions, bundles = [read_run(run) for run in runs], [load_bundle(run / "bundle") for run in runs]
    _check_alike(runs, bundles, configs)
    _warn_of_starts(configs)
    # The bundles have the hierarchy; its file may have changed.
    manifest, identity = prepare_data(configs[0].changed({"data.hierarchy": None}))
    manifest = replace(manifest, hierarchy=bundles[0].info.tree)
    if identity["fingerprint"] != bundles[0].info.data.get("fingerprint"):
        raise DataError(f"{manifest.source}: has changed since {runs[0]} was trained on it; train the runs again")
    scorer = AverageScorer(
        bundles[0].classifier(choose_device(configs[0].trainer.device)), preprocess_of(bundles[0].info), manifest,
        batch_size=configs[0].data.batch_size, seed=configs[0].trainer.seed,
    )  # fmt: skip
    scores = [scorer.score(bundle.weights(), is_average=False) for bundle in bundles]
    scorer.recompute_differing([bundle.weights() for bundle in bundles])
    order = sorted(range(len(runs)), key=lambda i: -scores[i])
    average = _uniform if method == "uniform" else _greedy
    members, score, weights = average(scorer, [(runs[i], bundles[i], scores[i]) for i in order])
    scorer.classifier.load_state_dict(weights)
    averaged = ", ".join(str(member.run) for member in members if member.averaged)
    place = {
        "trainer.runs_dir": str(target.parent),
        "trainer.run_name": target.name,
        "trainer.copy_to": None,
        "tracking.model_name": None,
    }
    config = configs[order[0]].changed(place)
    assembly = _assembly(scorer, config, {**identity, "average of": averaged}, bundles[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        run_dir = Path(folder) / target.name
        metrics = _write(assembly, run_dir, averaged)
        difference, count = against(best := predictions[order[0]], read_run(run_dir))
        compared = best.metric
        soup = Soup(target, method, members, scorer.metric, score, metrics, compared, difference, count)
        write_atomically(run_dir / RECORD, json.dumps(asdict(soup), indent=1, default=str).encode())
        run_dir.rename(target)
    return soup


Ranked = Sequence[tuple[Path, Bundle, float]]
"""(run, its bundle, its score), the best first."""

Averaged = tuple[list[Member], float, dict[str, Tensor]]
"""(all runs, the score of the average, its weights)."""


def _greedy(scorer: AverageScorer, ranked: Ranked) -> Averaged:
    run, bundle, score = ranked[0]
    members, weights, total = [Member(run, score, averaged=True)], bundle.weights(), WeightSum()
    total.add(weights)
    for run, bundle, own_score in ranked[1:]:
        candidate = bundle.weights()
        with_it = scorer.score(total.mean_with(candidate), is_average=True)
        improves = with_it >= score
        if improves:
            total.add(candidate)
            score, weights = with_it, scorer.weights()
        members.append(Member(run, own_score, averaged=improves, with_it=with_it))
    return members, score, weights


def _uniform(scorer: AverageScorer, ranked: Ranked) -> Averaged:
    total = WeightSum()
    for _, bundle, _ in ranked[:-1]:
        total.add(bundle.weights())
    score = scorer.score(total.mean_with(ranked[-1][1].weights()), is_average=True)
    return [Member(run, own_score, averaged=True) for run, _, own_score in ranked], score, scorer.weights()


def _check_alike(runs: Sequence[Path], bundles: Sequence[Bundle], configs: Sequence[Config]) -> None:
    """Raise ConfigError for runs that are equal, or that differ in labels, network, preprocessing or data."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError(f"{', '.join(map(str, runs))}: a run is named twice; name each run once")
    infos = [bundle.info for bundle in bundles]
    first, *others = map(_facts, infos)
    for run, facts, info, config in zip(runs[1:], others, infos[1:], configs[1:], strict=True):
        for key in dict.fromkeys([*first, *facts]):
            if first.get(key) != facts.get(key):
                raise ConfigError(
                    f"{runs[0]} and {run} differ in {key}: {first.get(key)} and {facts.get(key)}; "
                    "average runs with the same labels, network and preprocessing"
                )
        if config.trainer.fold != configs[0].trainer.fold:
            raise ConfigError(
                f"{runs[0]} and {run} differ in trainer.fold: {configs[0].trainer.fold} and {config.trainer.fold}. Each was trained on "
                "validation samples of the other, so no validation sample can measure their average; train the runs with trainer.folds: 0"
            )
        if info.data.get("fingerprint") != infos[0].data.get("fingerprint"):
            raise ConfigError(
                f"{runs[0]} and {run} differ in their data or splits, so they have no common validation set; train the runs on the same "
                f"data with the same trainer.seed, or with --data.source {runs[0] / 'splits.csv'}"
            )


def _facts(info: BundleInfo) -> dict[str, Any]:
    """Return dotted key → value of what averaged runs have in common."""
    labels = dict(enumerate(info.labels))
    values = {
        "task": info.task,
        "labels": labels,
        "network": info.network,
        "text": info.text,
        "hierarchy": info.hierarchy and info.hierarchy["parents"],
    }
    return dict(flattened({**values, "preprocess": info.preprocess}))


def _warn_of_starts(configs: Sequence[Config]) -> None:
    starts = {(c.model.weights, c.trainer.seed if c.model.weights == "none" else None) for c in configs}
    if len(starts) > 1:
        log.warning(
            "the runs start from different weights, and averages of such runs are usually worse than each of them; "
            "start all runs from the same model.weights"
        )


def _assembly(scorer: AverageScorer, config: Config, identity: dict[str, str], bundle: Bundle) -> Assembly:
    """Build what a training has after its last epoch, with the average as its classifier."""
    classifier, manifest = scorer.classifier, scorer.manifest
    module = ClassifierModule(classifier, task=manifest.task, num_classes=len(manifest.labels))
    options: dict[str, Any] = {"tokens": classifier.tokens, "reads_images": "images" in classifier.reads}
    data = ImageDataModule(
        manifest, augmenter=Augmenter("none", config.trainer.seed, size=config.data.sides()), preprocess=scorer.preprocess,
        batch_size=config.data.batch_size, workers=0, **options,
    )  # fmt: skip
    device = next(classifier.parameters()).device.type
    return Assembly(config, manifest, identity, module, data, device, "32-true", Ranks(0, 1, 1), bundle.info.text)


def _write(assembly: Assembly, run_dir: Path, averaged: str) -> dict[str, float]:
    """Evaluate the average, write the files of a run, and return the metrics on the test set."""
    assessment = evaluate(assembly, run_dir, None, [])
    assessment.report.numbers["facts"]["average of"] = averaged
    write_config(assembly.config, run_dir)
    write_splits(assembly.manifest, run_dir / "splits.csv")
    assessment.report.write(run_dir)
    write_predictions(run_dir, assessment.evaluation, [])
    package(assembly, run_dir, assessment)
    write_card(run_dir, read_facts(run_dir))
    return assessment.evaluation.metrics | assessment.more
