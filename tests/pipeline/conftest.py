"""Fixtures: small data sets, and the command as a user runs it."""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import browser  # noqa: F401  a fixture of the tests of a review's page
from copied_runs import one_store, painted, store  # noqa: F401  fixtures of the tests of copied runs
from review_browser import review  # noqa: F401  the other one
from small_data import COLORS, Run, Training, make_image, paint, write_image
from warm_process import Started, WarmProcess, shared


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in tmp_path: MLflow writes a new experiment's files below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CLASS/NN.jpg: three classes of 20 images."""
    root = tmp_path / "images"
    for label in COLORS:
        for number in range(20):
            write_image(root / label / f"{number:02}.jpg", make_image(label, number))
    return root


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images`, a folder of class folders with names of other scripts and files that are skipped; and its archives."""
    root = tmp_path_factory.mktemp("data")
    images = root / "images"
    paint(images, range(10))
    (images / "red").rename(images / "röt 红")
    for number in range(4):
        (images / "blue" / "deep").mkdir(exist_ok=True)
        (images / "blue" / f"{number:03}.png").rename(images / "blue" / "deep" / f"{number}.png")
    (images / "blue" / "notes.txt").write_text("a note")
    (images / "__MACOSX").mkdir()
    (images / "__MACOSX" / "._1.png").write_bytes(b"\0")
    (images / "loose.png").write_bytes((images / "green" / "000.png").read_bytes())
    for kind in ("zip", "tar", "gztar", "bztar", "xztar"):
        shutil.make_archive(str(root / "photos"), kind, images)
        shutil.make_archive(str(root / "wrapped"), kind, root, "images")
    with zipfile.ZipFile(root / "stored.zip", "w", zipfile.ZIP_STORED) as target:
        for path in sorted(images.rglob("*"), reverse=True):
            target.write(path, path.relative_to(images))
    return root


@pytest.fixture
def new_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read remote files as a new process with an empty cache, and wait little between attempts."""
    from refract.pipeline.data import remote_files
    from refract.remote import client

    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(remote_files, "_versions", {})
    monkeypatch.setattr(remote_files, "_listed", set())
    monkeypatch.setattr(remote_files, "_searched", set())
    client._store.cache_clear()  # whose connections are those of an earlier test's server


@pytest.fixture(scope="session")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights of timm/tf_efficientnet_lite0."""
    from benchmarks.pretrained import lite0_weights

    return lite0_weights(tmp_path_factory.mktemp("weights") / "lite0.safetensors")


@pytest.fixture(scope="session")
def warm() -> WarmProcess:
    return shared()


@pytest.fixture
def refract(tmp_path: Path, new_tracking: Path, warm: WarmProcess) -> Run:
    """Run `refract …` in tmp_path with the default tracking database, which exists and is empty."""
    if not (tmp_path / "mlflow.db").exists():
        shutil.copy(new_tracking, tmp_path / "mlflow.db")

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(tmp_path / "home")}
        environment.pop("MLFLOW_TRACKING_URI", None)
        done = warm.run([*map(str, arguments)], cwd=tmp_path, env=environment, seconds=240)
        assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def training(tmp_path: Path, warm: WarmProcess) -> Training:
    """Start `refract train …` in tmp_path."""

    @contextmanager
    def start(*arguments: object, **options: Any) -> Iterator[Started]:
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        process = warm.start(["train", *map(str, arguments)], cwd=tmp_path, env=environment, **options)
        with process.output:
            yield process
        process.wait(60)

    return start


@pytest.fixture(scope="session")
def npm_archive() -> Path:
    """The npm package onnxruntime-web, which npm loads into the cache folder if it is not there."""
    from refract.pipeline.export.browser import runtime
    from refract.pipeline.export.target import ExportError

    try:
        return runtime.cached_archive()
    except ExportError:
        if shutil.which("npm") is None:
            pytest.skip("npm, which loads onnxruntime-web, is not installed (Debian: apt-get install npm)")
        view = ["npm", "view", "--fetch-retries=0", "onnxruntime-web", "version"]
        if subprocess.run(view, capture_output=True, check=False).returncode:
            pytest.skip("the npm registry, which has onnxruntime-web, cannot be reached")
        raise
