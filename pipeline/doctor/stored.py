"""Write and read the findings of a run. Imports no training code, so that `refract doctor` starts quickly."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.doctor.record import Record
from refract.pipeline.files import write_atomically
from refract.pipeline.finding import Finding

FILE = "doctor.json"


def write_findings(run_dir: Path, findings: Sequence[Finding], record: Record) -> None:
    """Write `doctor.json`: the findings and the record that they are derived from."""
    values = {"findings": [finding.to_dict() for finding in findings], "record": dataclasses.asdict(record)}
    write_atomically(run_dir / FILE, json.dumps(values, indent=1).encode())


def read_findings(run_dir: Path) -> tuple[list[Finding], dict[str, Any]]:
    """Return the findings and the record. Raises ConfigError if the run has none or its file is damaged."""
    try:
        values = json.loads((run_dir / FILE).read_text("utf-8"))
        sum(values["record"]["seconds"].values())
        return [Finding.from_dict(finding) for finding in values["findings"]], values["record"]
    except FileNotFoundError as error:
        why = (
            f"has no {FILE}; a run gets one when it finishes"
            if run_dir.is_dir()
            else "no such folder; give a run's folder, such as runs/NAME"
        )
        if run_dir.is_dir() and (run_dir.parent / FILE).is_file():
            why = f"is a folder inside a run; give the run's folder, {run_dir.parent}"
        raise ConfigError(f"{run_dir}: {why}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run_dir / FILE}: cannot be read ({error})") from error
