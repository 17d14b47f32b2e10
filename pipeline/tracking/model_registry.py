"""Access to MLflow's model registry for promotion and retraining."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.sections import TrackingConfig
from refract.pipeline.tracking.address import absolute, tracking_uri, with_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from refract.pipeline.tracking.model_card import ModelFacts


def client_of(uri: str) -> Any:
    """Return the MLflow client of one server, for runs and for the registry."""
    from mlflow import MlflowClient

    uri = with_credentials(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def registry_of(tracking: TrackingConfig) -> tuple[Any, str, dict[str, str]]:
    """Return (client, the registered model's name, its aliases). The aliases are empty if the model is not registered yet."""
    from refract.pipeline.tracking.aliases import PromotionError, aliases
    from refract.pipeline.tracking.database import make_database

    uri, name = absolute(tracking_uri(tracking)), str(tracking.model_name)
    make_database(uri)
    client = client_of(uri)
    try:
        return client, name, aliases(client, name)
    except PromotionError:
        return client, name, {}


def download(client: "MlflowClient", name: str, version: str, folder: Path) -> Path:
    """Download the bundle of a registered version to the folder, and return its path."""
    import mlflow

    source = client.get_model_version_download_uri(name, version)
    return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=client.tracking_uri))


def add_gate(client: "MlflowClient", name: str, version: str, facts: "ModelFacts") -> None:
    """Add the gate's result to a version's description, in place of an earlier one. What users added before it stays."""
    from refract.pipeline.tracking.model_card import version_description, with_gate

    stored = client.get_model_version(name, version).description
    text = version_description(facts) if not stored or facts.gate is None else with_gate(stored, facts.gate)
    client.update_model_version(name, version, text)
