"""Whether challenger or champion was trained on the holdout that the gate compares them on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refract.pipeline.config.config import Config
from refract.pipeline.data.manifest import Sample
from refract.pipeline.retraining.champion_data import champion_data
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.gate import Line
from refract.pipeline.retraining.stored_snapshots import known_contents
from refract.pipeline.retraining.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient


def holdout_line(
    config: Config,
    workspace: Workspace,
    snapshot: str,
    held: Sequence[Sample],
    client: "MlflowClient",
    champion: str | None,
) -> Line:
    """Build the gate's line on samples of the holdout that a model was trained on.

    snapshot: digest of the challenger's training data; champion: its version, None without a champion.
    """
    nothing = frozenset[str]()
    of_challenger = trained_on(workspace, snapshot, held) or nothing
    of_champion = nothing if champion is None else _champion_trained_on(config, workspace, held, client, champion)
    overlap = of_challenger | (of_champion or nothing)
    if overlap:
        summary = f"{len(overlap)} of its images were trained on"
        by_hand = "; if the new version is better, promote it by hand (refract promote --force --why REASON)"
        return Line("holdout", None, None, False, summary + (by_hand if not of_challenger else ""))
    if of_champion is None:
        summary = "the champion's training data are unknown and may overlap with this holdout"
        remedy = f"for a fair one, move {workspace.holdout} away and set gate.holdout to images that are new to it"
        return Line("holdout", None, None, None, f"{summary}; {remedy}")
    return Line("holdout", None, None, True, "no model was trained on its images")


def trained_on(workspace: Workspace, digest: str | None, held: Sequence[Sample]) -> frozenset[str] | None:
    """Return the keys of the holdout's samples that a snapshot trains on; None if the snapshot is missing."""
    trained = None if digest is None else known_contents(workspace.snapshot(digest))
    return None if trained is None else frozenset(sample.key for sample in held if trained & contents(sample))


def _champion_trained_on(
    config: Config, workspace: Workspace, held: Sequence[Sample], client: "MlflowClient", champion: str
) -> frozenset[str] | None:
    """Use the champion's snapshot if it is in the workspace, else the splits of its run."""
    tags = client.get_model_version(str(config.tracking.model_name), champion).tags
    by_snapshot = trained_on(workspace, tags.get("snapshot"), held)
    if by_snapshot is not None:
        return by_snapshot
    data = champion_data(config, client, champion)
    return None if data is None else data.trained_on(held)
