"""The tags of a registered version that have the verdict of the promotion gate."""

from typing import TYPE_CHECKING

from refract.pipeline.retraining.gate import Verdict
from refract.pipeline.tracking.store import LONGEST_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient


def store_verdict(
    client: "MlflowClient", name: str, version: str, verdict: Verdict, champion: str | None, effect: str
) -> None:
    """Tag the version with each line of the verdict and with its result, the last. effect: of corrections, empty if not measured.

    MlflowException if MLflow refuses.
    """
    tags = {f"gate.{_key(line.name)}": f"{_word(line.passed)}: {line.summary}" for line in verdict.lines}
    if effect:
        tags["labels.effect"] = effect
    if verdict.versions:
        tags["gate.versions"] = "; ".join(one.text() for one in verdict.versions)
    tags |= {"gate.against": champion or "none", "gate": "passed" if verdict.passed else "failed"}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value[:LONGEST_TAG])


def _word(passed: bool | None) -> str:
    return "unknown" if passed is None else str(passed)


def _key(name: str) -> str:
    """Return a tag name that MLflow accepts: it must be a normalised path, so it has no slash.

    Other characters are replaced by their code point, so that two labels have two tags.
    """
    return "".join(c if c.isalnum() or c in "_-. " else f"_x{ord(c):x}_" for c in name)[:200]
