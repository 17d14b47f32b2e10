"""The events of `retrain.webhook`: what a retraining run reports at its end."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refract.models.credentials import masked
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.retraining.workspace import Record, workspace_of
from refract.pipeline.webhooks.delivery import URL, problem_of
from refract.pipeline.webhooks.outbox import Outbox

log = logging.getLogger(__name__)

OUTCOMES: Mapping[int, str] = {0: "promoted", 10: "not_promoted", 20: "refused", 30: "failed"}
"""Exit code of a run → its name in `retrain.webhook_on`; a run that changed nothing is `unchanged`."""


def outbox(config: Config) -> Outbox | None:
    """Return the outbox of the model's workspace, None without an address. ConfigError for an invalid REFRACT_WEBHOOK_URL."""
    url = os.environ.get(URL) or config.retrain.webhook
    if not url:
        return None
    if expected := problem_of(url):
        raise ConfigError(f"{URL}: expected {expected}")  # the config's is checked when it is read
    return Outbox(workspace_of(config).root / "webhooks", url)


def notify(folder: Path, config: Config, record: Record, outcome: int, why: str) -> None:
    """Store the event of a run in the outbox and try to deliver all that wait. Errors are logged: no webhook fails a run.

    outcome: an exit code; folder: the folder of the run. A step that is repeated after a kill stores the same ID again.
    """
    try:
        box = outbox(config)
        if box is None:
            return
        name = name_of(outcome, record)
        if name in config.retrain.webhook_on:
            box.add(
                event_of(folder, str(config.tracking.model_name), record, name, why), event=_id_of(folder, record, name)
            )
        box.deliver_in_background()
    except ConfigError as error:
        log.warning("webhook: %s", error)
    except OSError as error:
        log.warning("webhook: %s: %s", error.filename or folder, error.strerror or error)


def name_of(outcome: int, record: Record) -> str:
    """Return the name of a run's result. outcome: an exit code."""
    return "unchanged" if record.get("unchanged") and not outcome else OUTCOMES[outcome]


def _id_of(folder: Path, record: Record, outcome: str) -> str | None:
    """Return the ID of the event of a run that has ended; None for a failed attempt, as each is another event."""
    if outcome == "failed":
        return None
    known = {key: value for key, value in record.items() if key != "attempts"}  # a resumed run counts one more
    return hashlib.sha256(json.dumps([str(folder.absolute()), known], sort_keys=True).encode()).hexdigest()[:32]


def event_of(folder: Path, model: str, record: Record, outcome: str, why: str) -> dict[str, Any]:
    """Return the body of an event. Entries of steps that did not run are missing. model: `tracking.model_name`."""
    lines = record.get("gate", {}).get("lines", ())
    body: dict[str, Any] = {
        "event": "retraining",
        "outcome": outcome,
        "why": why,
        "model": model,
        "run": folder.name,
        "began": record.get("began"),
        "metrics": {line["name"]: line["value"] for line in lines if line["value"] is not None},
        "links": links_of(folder, model, record),
    }
    keys = ("version", "champion", "gate", "labels", "drift", "start", "corrections", "label_effect")
    return body | {key: record[key] for key in keys if key in record}  # type: ignore[literal-required] # keys of Record


def links_of(folder: Path, model: str, record: Record) -> dict[str, str]:
    """Return name → path on this machine, or address of MLflow's page if its server has pages."""
    links = {"run": str(folder.absolute())}
    training = Path(record.get("training_run", "")) / "report.html" if "training_run" in record else None
    for name, page in (("report", folder / "report" / "report.html"), ("training_report", training)):
        if page is not None and page.exists():
            links[name] = str(page.absolute())
    server = masked(record.get("mlflow", "")).rstrip("/")
    if server.startswith(("http://", "https://")) and "version" in record:
        links["mlflow_version"] = f"{server}/#/models/{model}/versions/{record['version']}"
        links["mlflow_run"] = f"{server}/#/runs/{record['mlflow_run']}" if "mlflow_run" in record else server
    return links
