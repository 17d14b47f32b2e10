"""Challenger and champion on two versions of the holdout: the corrected one, by which the gate decides, and the one before."""

from typing import Any

from refract.models.bundle.bundle import Bundle
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.retraining.gate import OnVersion, Verdict, measure
from refract.pipeline.retraining.holdout_versions import difference, load_version, versions
from refract.pipeline.retraining.workspace import Workspace


def on_both_versions(
    workspace: Workspace, verdict: Verdict, held: Manifest, challenger: Bundle, champion: Bundle, before: str | None
) -> tuple[OnVersion, ...]:
    """Measure both models on the earlier version, and read their accuracies on the present one from the verdict.

    held: the present version; before: digest of the version that the champion was promoted on, None if unknown: then the one before the
    present version. Empty if no sample of the earlier version was corrected, or if its table is missing. BundleError as `measure`.
    """
    numbers = {one.digest: one.number for one in versions(workspace.holdout)}
    if before is None:
        before = next((digest for digest in reversed(numbers) if digest != verdict.holdout), None)
    earlier = None if before is None else load_version(workspace.holdout, before, _kind(held))
    if earlier is None or before is None or before == verdict.holdout:
        return ()
    corrections = difference(earlier, held)
    if not corrections.count:
        return ()
    values: dict[str, Any] = {line.name: line.value for line in verdict.lines}
    new, old = (float(measure(bundle, earlier).right.mean()) for bundle in (challenger, champion))
    accuracy = float(values["accuracy"])
    return (
        OnVersion(
            numbers.get(verdict.holdout), verdict.holdout, verdict.images, accuracy, accuracy - float(values["margin"]), True
        ),
        OnVersion(numbers.get(before), before, len(earlier.samples), new, old, False, corrections.text()),
    )  # fmt: skip


def _kind(manifest: Manifest) -> str:
    return "multilabel" if manifest.task == "multilabel" else "multiclass"
