"""The report of a retraining run: its result, the gate, the corrections taken in, their effect, and the versions of the holdout."""

import logging
from pathlib import Path

from refract.pipeline.retraining.notification import event_of
from refract.pipeline.retraining.workspace import Record
from refract.pipeline.tracking.model_registry import client_of

log = logging.getLogger(__name__)

FOLDER, ARTIFACT = "report", "retraining.html"


def write_report(folder: Path, model: str, record: Record, outcome: str, why: str) -> None:
    """Write `report/report.html` and `report.json` to the run's folder, and the page to MLflow. Errors are logged: the run has ended."""
    from refract.pipeline.evaluation.report import Report

    numbers = {"gate": {}, "corrections": {}, "label_effect": {}, **event_of(folder, model, record, outcome, why)}
    try:
        page, _ = Report(f"Retraining of {model}", numbers, template="retraining.html").write(folder / FOLDER)
        if "mlflow_run" in record:
            client_of(record["mlflow"]).log_text(record["mlflow_run"], page.read_text("utf-8"), ARTIFACT)
    except Exception as error:  # MLflow and the libraries below it raise many types
        log.warning("report: %s", error)
