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
    config: Config, workspace: Workspace, snapshot: str, held: Sequence[Sample], client: Any, champion: str | None
) -> Line:
    """Build the gate's line on samples of the holdout that a model was trained on.

    snapshot: digest of the challenger's training data; champion: its version, None without a champion.
    """
    challenger_count = trained_on(workspace, snapshot, held) or 0
    champion_count = 0 if champion is None else _champion_trained_on(config, workspace, held, client, champion)
    if challenger_count or champion_count:
        told = f"{challenger_count + (champion_count or 0)} of its images were trained on"
        by_hand = "; if the new version is better, promote it by hand (refract promote --force --why REASON)"
        return Line("hold-out", None, None, False, told + (by_hand if not challenger_count else ""))
    if champion_count is None:
        told = "the champion's training data are unknown and may overlap with this holdout"
        remedy = f"for a fair one, move {workspace.holdout} away and set gate.holdout to images that are new to it"
        return Line("hold-out", None, None, None, f"{told}; {remedy}")
    return Line("hold-out", None, None, True, "no model was trained on its images")


def trained_on(workspace: Workspace, digest: str | None, held: Sequence[Sample]) -> int | None:
    """Count the holdout's samples that a snapshot trains on; None if the snapshot is missing."""
    trained = None if digest is None else known_contents(workspace.snapshot(digest))
    return None if trained is None else sum(bool(trained & contents(sample)) for sample in held)


def _champion_trained_on(
    config: Config, workspace: Workspace, held: Sequence[Sample], client: Any, champion: str
) -> int | None:
    """Count by the champion's snapshot if it is in the workspace, else by the splits of its run."""
    tags = client.get_model_version(str(config.tracking.model_name), champion).tags
    count = trained_on(workspace, tags.get("snapshot"), held)
    if count is not None:
        return count
    data = champion_data(config, client, champion)
    return None if data is None else data.trained_on(held)
