"""`deploy/` and the Dockerfile match the code that they start. `make image-check` builds and runs the image itself."""

import json
import re
from pathlib import Path

import pytest
import yaml

from refract.serve.cli.options import parse
from refract.serve.http.transport.server import GRACE_S, STUCK_S

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text("utf-8"))
OBJECTS = {
    manifest["kind"]: manifest
    for manifest in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8"))
}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
KSERVE = list(yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text("utf-8")))
PREDICTORS = {service["metadata"]["name"]: service["spec"]["predictor"] for service in KSERVE}
SERVERS = [COMPOSE["services"][name] for name in ("cpu", "gpu")]


def words(instruction: str) -> list[str]:
    """Return the words of the Dockerfile's last ENTRYPOINT or CMD, except those of a HEALTHCHECK."""
    return yaml.safe_load(re.findall(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])


ENTRY = words("ENTRYPOINT")
COMMANDS = [
    words("CMD"),
    CONTAINER["args"],
    *([*server["command"]] for server in SERVERS),
    *(predictor["containers"][0]["args"] for predictor in PREDICTORS.values()),
]


@pytest.mark.parametrize("command", COMMANDS, ids=["image", "kubernetes", "cpu", "gpu", "kserve", "kserve-grpc"])
def test_refract_serve_accepts_every_command(command):
    assert ENTRY[:2] == ["refract", "serve"]
    arguments = parse([*ENTRY[2:], *command])
    assert (arguments.host, arguments.port) == ("0.0.0.0", 8000)
    assert arguments.source
    if len(command) > 1:
        assert arguments.metrics_port == 9000


def test_the_ports_match_those_of_the_server():
    assert "EXPOSE 8000" in DOCKERFILE and "127.0.0.1:8000/livez" in DOCKERFILE
    assert {port["name"]: port["containerPort"] for port in CONTAINER["ports"]} == {"http": 8000, "metrics": 9000}
    assert OBJECTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == "9000"
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    for server in SERVERS:
        assert server["ports"] == ["127.0.0.1:8000:8000", "127.0.0.1:9000:9000"]


@pytest.mark.parametrize("service", KSERVE, ids=PREDICTORS)
def test_kserve_accepts_each_service_and_stops_it_without_requests(service):
    """KServe's own fields by a schema of those; the others as a pod, by the schema of Kubernetes."""
    jsonschema, kubernetes = pytest.importorskip("jsonschema"), pytest.importorskip("kubernetes_validate")
    schema = json.loads(Path(__file__).with_name("inferenceservice.schema.json").read_text("utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(service)] == []
    predictor = service["spec"]["predictor"]
    assert list(validator.iter_errors({**service, "spec": {"predictor": {**predictor, "minReplica": 0}}}))
    pod = {name: predictor[name] for name in ("containers", "volumes")}
    metadata = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"]}
    kubernetes.validate({**metadata, "spec": pod}, "1.35", strict=True)
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate({**metadata, "spec": {**pod, "volume": []}}, "1.35", strict=True)
    assert predictor["minReplicas"] == 0 < predictor["maxReplicas"]


def test_kserve_routes_to_the_port_of_each_protocol():
    """Knative accepts one port, whose name states the version of HTTP; KServe finds its container and the bundle by their names."""
    for name, port_name, option in (("refract", "http1", "port"), ("refract-grpc", "h2c", "grpc_port")):
        (container,) = PREDICTORS[name]["containers"]
        options = parse([*ENTRY[2:], *container["args"]])
        (port,) = container["ports"]
        assert port == {"name": port_name, "containerPort": getattr(options, option), "protocol": "TCP"}
        assert container["name"] == "kserve-container" and options.source == "/mnt/models"
        assert [variable["name"] for variable in container["env"]] == ["STORAGE_URI"]
        (probed,) = {
            probe["port"]
            for kind in ("readiness", "liveness")
            for probe in container.get(f"{kind}Probe", {}).values()
            if isinstance(probe, dict)
        }
        assert probed == port["containerPort"]
        security = CONTAINER["securityContext"] | {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001}
        assert container["securityContext"] == security and container["volumeMounts"] == CONTAINER["volumeMounts"]


def test_the_image_has_what_kserve_starts():
    locked = (ROOT / "requirements-serve.lock").read_text("utf-8")
    assert "\ngrpcio==" in locked and "\nopenvino==" in locked


def test_the_probes_use_existing_paths(bundle, serving):
    from refract.serve.http.app import create_app
    from refract.serve.runtime.engine import Engine

    paths = {CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    http = PREDICTORS["refract"]["containers"][0]
    paths |= {http[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")}
    asked = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", DOCKERFILE + str(SERVERS))
    with serving(create_app(Engine(bundle, "cpu", "eager"))) as client:
        assert {path: client.get(path).status_code for path in {*paths, *asked}} == {"/livez": 200, "/readyz": 200}


def test_the_autoscaler_uses_an_existing_metric(bundle):
    from prometheus_client import generate_latest

    from refract.serve.http.app import create_app
    from refract.serve.runtime.engine import Engine

    app = create_app(Engine(bundle, "cpu", "eager"))
    name = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f"\n{name} " in generate_latest(app.state.service.metrics.registry).decode()


def test_the_grace_periods_exceed_the_shutdown_time_of_the_server():
    drain = parse([*ENTRY[2:], *CONTAINER["args"]]).drain_s
    assert POD["terminationGracePeriodSeconds"] > drain + GRACE_S + STUCK_S
    assert drain > 0
    assert all(int(server["stop_grace_period"].removesuffix("s")) > GRACE_S + STUCK_S for server in SERVERS)


def test_the_server_runs_as_nobody_and_writes_only_to_tmp():
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert [POD["securityContext"][key] for key in ("runAsUser", "runAsGroup")] == [
        int(number) for number in user.groups()
    ]
    security = CONTAINER["securityContext"]
    assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert CONTAINER["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert "HOME=/tmp" in DOCKERFILE
    for server in SERVERS:
        assert server["read_only"] is True and server["cap_drop"] == ["ALL"] and server["tmpfs"] == ["/tmp"]
        assert server["security_opt"] == ["no-new-privileges:true"]


def test_selectors_match_the_pods():
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert (
        OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == OBJECTS["Deployment"]["metadata"]["name"]
    )


def test_the_build_context_contains_all_copied_files():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = [
        line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    assert {path for paths in copied for path in paths} == allowed
    assert all((ROOT / path).exists() for path in allowed)


def test_the_locks_of_the_image_are_subsets_of_the_whole_lock():
    def pinned(name: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==[^\s;]+", (ROOT / name).read_text("utf-8"), re.MULTILINE))

    whole = pinned("requirements.lock")
    for part in ("requirements-serve.lock", "requirements-build.lock"):
        assert pinned(part) and pinned(part) <= whole
    served = {line.partition("==")[0] for line in pinned("requirements-serve.lock")}
    assert "transformers" in served, "a bundle may use one to read texts"
    assert not served & {
        "lightning",
        "pandas",
        "mlflow",
        "scikit-learn",
    }
