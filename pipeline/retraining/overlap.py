"""Whether challenger or champion was trained on the holdout that the gate compares them on."""

from collections.abc import Sequence
from typing import Any

from refract.pipeline.config.config import Config
from refract.pipeline.data.manifest import Sample
from refract.pipeline.retraining.champion_data import champion_data
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.gate import Line
from refract.pipeline.retraining.snapshot import known_contents
from refract.pipeline.retraining.workspace import Workspace


def holdout_line(
    config: Config, place: Workspace, snapshot: str, held: Sequence[Sample], client: Any, champion: str | None
) -> Line:
    """The gate's line. snapshot: digest of what the challenger was trained on; champion: its version, None where there is none."""
    own = trained_on(place, snapshot, held) or 0
    before = 0 if champion is None else _champion_trained_on(config, place, held, client, champion)
    if own or before:
        told = f"{own + (before or 0)} of its images were trained on"
        by_hand = "; if the new version is better, promote it by hand (refract promote --force --why REASON)"
        return Line("hold-out", None, None, False, told + (by_hand if not own else ""))
    if before is None:
        told = "what the champion was trained on is unknown, so it may know this holdout"
        remedy = f"for a fair one, move {place.holdout} away and set gate.holdout to images that it never saw"
        return Line("hold-out", None, None, None, f"{told}; {remedy}")
    return Line("hold-out", None, None, True, "neither was trained on any of it")


def trained_on(place: Workspace, digest: str | None, held: Sequence[Sample]) -> int | None:
    """How many of the holdout's samples a snapshot trains on; None where the snapshot is not known."""
    trained = None if digest is None else known_contents(place.snapshot(digest))
    return None if trained is None else sum(bool(trained & contents(sample)) for sample in held)


def _champion_trained_on(
    config: Config, place: Workspace, held: Sequence[Sample], client: Any, champion: str
) -> int | None:
    """By its snapshot, where that is here, else by the splits of its run."""
    tags = client.get_model_version(str(config.tracking.model_name), champion).tags
    count = trained_on(place, tags.get("snapshot"), held)
    if count is not None:
        return count
    data = champion_data(config, client, champion)
    return None if data is None else data.trained_on(held)
