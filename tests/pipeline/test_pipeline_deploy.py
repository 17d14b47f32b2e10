"""The scheduled retraining of `deploy/`, checked against the schemas of Kubernetes and Compose and against the commands that it starts."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from importlib import import_module, resources
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from refract.cli import COMMANDS
from refract.pipeline.schedule.cron import Cron

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
GUIDE = (ROOT / "docs" / "retraining.md").read_text("utf-8")
OBJECTS = [
    (path.name, value)
    for path in sorted(DEPLOY.glob("kubernetes*.yaml"))
    for value in yaml.safe_load_all(path.read_text("utf-8"))
]
RETRAIN = {value["kind"]: value for name, value in OBJECTS if name == "kubernetes-retrain.yaml"}
JOB = RETRAIN["CronJob"]["spec"]["jobTemplate"]["spec"]
POD = JOB["template"]["spec"]
CONTAINER = POD["containers"][0]


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / name)
    return parser


@pytest.mark.parametrize(("name", "value"), OBJECTS, ids=[f"{name}-{value['kind']}" for name, value in OBJECTS])
@pytest.mark.parametrize("version", ["1.29", "1.35"])
def test_every_object_matches_the_kubernetes_schema(name: str, value: Any, version: str) -> None:
    """kubernetes-validate has the API's schemas and rejects unknown fields."""
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(value, version, strict=True)
    wrong = json.loads(json.dumps(value).replace('"metadata"', '"metadatum"', 1))
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, version, strict=True)


def test_the_file_matches_the_compose_schema() -> None:
    """check-jsonschema carries the Compose specification's schema."""
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("check_jsonschema")
    schema = json.loads((resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    assert list(validator.iter_errors({**COMPOSE, "services": {"scheduler": {"imagine": "refract"}}}))


def test_compose_services_name_existing_files_and_targets() -> None:
    volumes = {mount.partition(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert {name for name in volumes if re.fullmatch(r"[\w-]+", name)} <= COMPOSE["volumes"].keys()
    nightly = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["nightly"]}
    assert nightly.keys() == {"database", "tracking", "scheduler"}
    for service in nightly.values():
        assert set(service.get("depends_on", {})) <= nightly.keys()
        assert all("healthcheck" in nightly[name] for name in service.get("depends_on", {}))
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
        assert "build" not in service or f"\nFROM ${{BASE}} AS {service['build']['target']}\n" in DOCKERFILE
    address = SERVICES["scheduler"]["environment"]["MLFLOW_TRACKING_URI"]
    assert address == SERVICES["cpu"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert SERVICES["tracking"]["networks"]["default"]["aliases"] == ["mlflow"]


def test_no_password_is_stored_or_port_published() -> None:
    text = json.dumps(SERVICES)
    assert "PASSWORD}" not in text, "an interpolated one is shown by docker inspect"
    assert COMPOSE["secrets"] == {"database": {"environment": "DATABASE_PASSWORD"}}
    assert SERVICES["database"]["environment"]["POSTGRES_PASSWORD_FILE"] == "/run/secrets/database"
    assert re.findall(r"//(\w+)(:\w+)?@", text) == [("mlflow", "")]
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", []))


def test_every_command_is_a_refract_command(capsys: pytest.CaptureFixture[str]) -> None:
    entry = re.search(r"AS train\n(?:.*\n)*?ENTRYPOINT (\[.*\])", DOCKERFILE)
    assert entry and yaml.safe_load(entry[1]) == ["refract"]
    assert CONTAINER["args"][0] in COMMANDS and SERVICES["scheduler"]["command"][0] in COMMANDS
    command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in SERVICES["scheduler"]["command"]]
    # The arguments are parsed before the config is found missing.
    assert import_module(COMMANDS[command[0]][0]).main(command[1:]) == 2
    assert "/config.yaml: no such file" in capsys.readouterr().err
    started = shlex.split(unit("refract-retrain.service")["Service"]["ExecStart"])
    assert Path(started[0]).name == "refract" and started[1] in COMMANDS


def test_the_config_of_the_manifest_is_valid() -> None:
    from refract.pipeline.config.config import config_from_dict

    (text,) = RETRAIN["ConfigMap"]["data"].values()
    config = config_from_dict(yaml.safe_load(text))
    assert config.tracking.model_name and config.data.source.startswith(CONTAINER["workingDir"])
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]} and mounts["work"] == CONTAINER["workingDir"]
    assert CONTAINER["args"][1] == f"{mounts['config']}/{next(iter(RETRAIN['ConfigMap']['data']))}"
    names = {volume["name"]: volume for volume in POD["volumes"]}
    assert names["work"]["persistentVolumeClaim"]["claimName"] == RETRAIN["PersistentVolumeClaim"]["metadata"]["name"]
    assert names["config"]["configMap"]["name"] == RETRAIN["ConfigMap"]["metadata"]["name"]


def test_one_run_at_a_time_without_root() -> None:
    spec = RETRAIN["CronJob"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["startingDeadlineSeconds"] > 0
    assert POD["restartPolicy"] == "Never" and JOB["activeDeadlineSeconds"] < 24 * 3600
    Cron(spec["schedule"], ZoneInfo(spec["timeZone"]))
    user = re.search(r"AS train\n(?:.*\n)*?USER (\d+):(\d+)", DOCKERFILE)
    assert user and [POD["securityContext"][key] for key in ("runAsUser", "runAsGroup")] == [*map(int, user.groups())]
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for name in ("tracking", "scheduler"):
        assert SERVICES[name]["read_only"] is True and SERVICES[name]["cap_drop"] == ["ALL"]


def test_the_lock_of_the_image_is_a_subset_of_the_full_lock() -> None:
    def pinned(name: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==[^\s;]+", (ROOT / name).read_text("utf-8"), re.MULTILINE))

    part = pinned("requirements-train.lock")
    assert part and part <= pinned("requirements.lock")
    names = {line.partition("==")[0] for line in part}
    assert names >= {"lightning", "mlflow", "metaflow", "apscheduler", "psycopg2-binary"} and not names & {
        "pytest",
        "kornia",
    }


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
@pytest.mark.parametrize("kind", ["service", "timer"])
def test_systemd_accepts_the_unit(tmp_path: Path, kind: str) -> None:
    for one in ("service", "timer"):
        text = (DEPLOY / f"refract-retrain.{one}").read_text()
        (tmp_path / f"refract-retrain.{one}").write_text(re.sub("ExecStart=[^ ]+", "ExecStart=/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / f"refract-retrain.{kind}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "refract-retrain" not in done.stderr, done.stderr


def test_the_timer_starts_the_service_daily() -> None:
    timer, service = unit("refract-retrain.timer"), unit("refract-retrain.service")
    assert timer["Timer"]["OnCalendar"] == "*-*-* 02:00:00" and timer["Timer"]["Persistent"] == "true"
    assert service["Service"]["Type"] == "oneshot" and service["Service"]["SuccessExitStatus"] == "10"
    assert timer["Install"]["WantedBy"] == "timers.target"


def test_the_crontab_lines_of_the_guide_are_valid() -> None:
    (line,) = re.findall(r"^(0 2 \* \* \*) +(.+)$", GUIDE, re.MULTILINE)
    Cron(line[0], ZoneInfo("UTC"))
    assert "refract retrain" in line[1] and "%" not in line[1], "cron takes a per cent sign as the end of a line"
    for name in re.findall(r"\(\.\./(deploy/[\w.-]+)\)", GUIDE):
        assert (ROOT / name).is_file()
