"""Build the image for CPUs, inspect it, and send requests to the server in it: `make image-check`. Exit code 1 if a check fails.

Uses Docker or Podman if one of them runs. Otherwise uses buildah as root on Debian or Ubuntu, which needs only chroot; without a registry,
the base image comes from debootstrap.
"""

import ast
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpus.case import encoded, random_image  # noqa: E402
from benchmarks.servers.start import make_bundle  # noqa: E402
from refract.models.bundle.bundle import Bundle, GoldenSample, load_bundle  # noqa: E402

IMAGE, OWN_BASE = "localhost/refract:cpu", "localhost/refract-base"
ABSENT = ("lightning", "pandas", "mlflow", "sklearn", "matplotlib", "pyarrow", "triton", "nvidia-cublas")
READY_S = 180
AGREED = 0.03
"""Largest difference of a backend that is not float32: see `refract.serve.runtime.backends`."""

LOOK = """
import importlib.metadata, json, pathlib, sys
names = sorted(d.name.lower() for d in importlib.metadata.distributions())
def size(path): return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
site = next(pathlib.Path(p) for p in sys.path if p.endswith("site-packages"))
folders = {p.name: size(p) for p in site.iterdir() if p.is_dir()}
print(json.dumps({"names": names, "folders": folders, "dependencies": size(pathlib.Path("/opt/refract"))}))
"""


class CheckError(Exception):
    """A check of the image failed."""


def main() -> int:
    """Build the image, inspect it, and send requests to its server."""
    try:
        engine = _engine()
        with tempfile.TemporaryDirectory(prefix="image-check-") as folder:
            Path(folder).chmod(0o755)  # the server runs as another user
            engine.build(Path(folder))
            files = [encoded(random_image(np.random.default_rng(seed)), "JPEG") for seed in range(8)]
            bundle = load_bundle(make_bundle("lenet5", files, Path(folder) / "bundle", size=32))
            with engine.container() as container:
                _look(container)
                _ask(container, bundle)
    except (CheckError, subprocess.SubprocessError, httpx.HTTPError) as err:
        print(f"image-check: {err}", file=sys.stderr)
        return 1
    print("image-check: passed")
    return 0


def _look(container: "Docker | Chroot") -> None:
    user = container.config()["User"]
    print(f"runs as {user or 'root'}")
    if user.partition(":")[0] in ("", "0", "root"):
        raise CheckError("the image's user is root")
    contents = json.loads(container.output("python", "-c", LOOK))
    largest = sorted(contents["folders"].items(), key=lambda item: -item[1])[:12]
    print(f"/opt/refract: {contents['dependencies'] / 1e6:.0f} MB; of its packages the largest:")
    print("\n".join(f"  {size / 1e6:6.0f} MB  {name}" for name, size in largest))
    if wrong := sorted(set(ABSENT) & set(contents["names"])):
        raise CheckError(f"the image contains {', '.join(wrong)}")


def _ask(container: "Docker | Chroot", bundle: Bundle) -> None:
    port = _free_port()
    with (
        container.serving(bundle.path, port) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        began = time.monotonic()
        while not _ready(client):
            if server.ended():
                raise CheckError("the server ended before it was ready")
            if time.monotonic() - began > READY_S:
                raise CheckError(f"the server is not ready after {READY_S} s")
            time.sleep(0.2)
        print(f"ready after {time.monotonic() - began:.1f} s, by {client.get('/v1/model').json().get('backend')}")
        for golden in bundle.golden_samples:
            answer = client.post("/v1/predict?top=10", content=golden.data, headers={"Content-Type": "image/jpeg"})
            _compare(answer, golden, bundle.info.labels)
        print(f"{len(bundle.golden_samples)} images were answered as in the bundle")
        code = server.stop()
        if code:
            raise CheckError(f"SIGTERM ended the server with exit code {code}")
        print("SIGTERM ended it with exit code 0")


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _compare(answer: httpx.Response, golden: GoldenSample, labels: tuple[str, ...]) -> None:
    if answer.status_code != 200:
        raise CheckError(f"{golden.name}: {answer.status_code} {answer.text}")
    confidences = {row["label"]: row["confidence"] for row in answer.json()["predictions"][0]["top"]}
    gap = max(abs(confidences[label] - wanted) for label, wanted in zip(labels, golden.probabilities, strict=True))
    if gap > AGREED:
        raise CheckError(f"{golden.name}: the answer differs from the bundle's by {gap:.3f}")


def _engine() -> "Docker | Buildah":
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return Docker(name)
    if os.getuid() or not shutil.which("apt-get"):
        raise CheckError("needs a Docker or Podman that runs, or root on Debian or Ubuntu")
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if missing:
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)
    return Buildah()


class Docker:
    """Docker, or Podman, which has the same commands, and a container of the image."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = ""

    def build(self, folder: Path) -> None:
        _run(
            self._name,
            "build",
            "--target",
            "cpu",
            *_pip_secret(folder),
            "-t",
            IMAGE,
            str(ROOT),
            env={"DOCKER_BUILDKIT": "1"},
        )
        _run(self._name, "history", "--format", "{{.Size}}\t{{.CreatedBy}}", IMAGE)

    @contextlib.contextmanager
    def container(self) -> Iterator["Docker"]:
        yield self

    def config(self) -> dict:
        return json.loads(_output(self._name, "inspect", "--type", "image", IMAGE))[0]["Config"]

    def output(self, *command: str) -> str:
        return _output(self._name, "run", "--rm", "--entrypoint", command[0], IMAGE, *command[1:])

    @contextlib.contextmanager
    def serving(self, model: Path, port: int) -> Iterator["Docker"]:
        hard = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
        where = ("-p", f"127.0.0.1:{port}:8000", "-v", f"{model}:/model:ro")
        self._started = _output(self._name, "run", "--detach", *hard, *where, IMAGE).strip()
        try:
            yield self
        finally:
            subprocess.run([self._name, "logs", self._started])
            subprocess.run([self._name, "rm", "--force", self._started], capture_output=True)

    def ended(self) -> bool:
        return _output(self._name, "inspect", "--format", "{{.State.Running}}", self._started).strip() != "true"

    def stop(self) -> int:
        _run(self._name, "kill", "--signal", "TERM", self._started)
        return int(_output(self._name, "wait", self._started))


class Buildah:
    """buildah with chroot isolation, which needs no other kernel feature of containers."""

    def __init__(self) -> None:
        self._base = "docker.io/library/python:3.12-slim"
        if subprocess.run(["buildah", "pull", "-q", self._base], capture_output=True).returncode:
            self._base = OWN_BASE
            if subprocess.run(["buildah", "inspect", "--type", "image", OWN_BASE], capture_output=True).returncode:
                _make_base()
        print(f"base image: {self._base}", flush=True)

    def build(self, folder: Path) -> None:
        options = ["--isolation", "chroot", "--format", "docker", "--layers", "--build-arg", f"BASE={self._base}"]
        certificates = os.environ.get("PIP_CERT", "")
        if certificates:
            options += ["--volume", f"{certificates}:{certificates}:ro"]
        _run("buildah", "build", *options, *_pip_secret(folder), "--target", "cpu", "-t", IMAGE, str(ROOT))
        _run("buildah", "images", IMAGE)

    @contextlib.contextmanager
    def container(self) -> Iterator["Chroot"]:
        name = _output("buildah", "from", IMAGE).strip()
        try:
            yield Chroot(name)
        finally:
            _run("buildah", "rm", name)


class Chroot:
    """A container of buildah, run by root with the image's settings: read-only except /tmp, without capabilities."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._root = _output("buildah", "mount", name).strip()
        self._process: subprocess.Popen[bytes] | None = None

    def config(self) -> dict:
        return json.loads(_output("buildah", "inspect", self._name))["Docker"]["config"]

    def output(self, *command: str) -> str:
        return _output("buildah", "run", "--isolation", "chroot", self._name, "--", *command)

    @contextlib.contextmanager
    def serving(self, model: Path, port: int) -> Iterator["Chroot"]:
        config, root = self.config(), self._root
        user, _, group = config["User"].partition(":")
        Path(root, "model").mkdir(exist_ok=True)
        bound = [f"mount --rbind /{name} {root}/{name}" for name in ("proc", "sys", "dev")]
        tmp_and_model = [f"mount -t tmpfs tmpfs {root}/tmp", f"mount --bind {model} {root}/model"]
        closed = [f"mount -o remount,bind,ro {path}" for path in (f"{root}/model", root)]
        mounts = " && ".join([f"mount --bind {root} {root}", *bound, *tmp_and_model, *closed])
        rights = [
            "--reuid",
            user,
            "--regid",
            group or user,
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ]
        command = [*config["Entrypoint"], *config["Cmd"], "--port", str(port)]
        inside = ["chroot", root, "env", "-i", *config["Env"], "setpriv", *rights, "--", *command]
        # Each of these commands replaces itself by the next one, so that the signal reaches the server.
        self._process = subprocess.Popen(["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *inside])
        try:
            yield self
        finally:
            self._process.kill()
            self._process.wait()

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)


def _make_base() -> None:
    with tempfile.TemporaryDirectory(prefix="image-base-") as folder:
        _run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", _release(), folder)
        name = _output("buildah", "from", "scratch").strip()
        _run("buildah", "copy", "-q", name, folder, "/")
        _run("buildah", "commit", "-q", "--rm", name, OWN_BASE)


def _release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line.partition("=")[2] for line in lines if line.startswith("VERSION_CODENAME="))


def _pip_secret(folder: Path) -> list[str]:
    """Pass this machine's pip settings, from files and the environment, to the build as a secret."""
    settings = _output(sys.executable, "-m", "pip", "config", "list").splitlines()
    values = {
        name.rpartition(".")[2]: ast.literal_eval(value)
        for name, _, value in (line.partition("=") for line in settings)
    }
    path = folder / "pip.conf"
    path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    return ["--secret", f"id=pip,src={path}"]


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env={**os.environ, **(env or {})})


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    sys.exit(main())
