"""Each tutorial works in an empty folder with nothing but its page: its files, programs and commands, from top to bottom."""

import contextlib
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from charts import DRAWN
from safetensors.numpy import load_file
from warm_process import Started, WarmProcess

from refract.models.bundle.bundle import load_bundle

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Reader:
    """A reader who follows a page in a folder. port: a free port, which replaces 8000."""

    def __init__(self, folder: Path, warm: WarmProcess, servers: contextlib.ExitStack, port: int) -> None:
        self.folder, self.warm, self.servers, self.port = folder, warm, servers, port
        self.names: dict[str, Any] = {"__name__": "tutorial"}
        self.output: list[str] = []
        # The page's own --backend comes first; without one, the server would convert the model for each backend and time them.
        environment = {**os.environ, DRAWN: "1", "HOME": str(folder / "home"), "REFRACT_SERVE_BACKEND": "eager"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        self.environment: Mapping[str, str] = environment

    def follow(self, page: str) -> str:
        """Run every block of the page. Returns the output of the commands."""
        for language, title, text in BLOCK.findall((TUTORIALS / page).read_text("utf-8")):
            text = text.replace("8000", str(self.port))
            if title:
                (self.folder / title).write_text(text, "utf-8")
            elif language == "python":
                exec(compile(text, page, "exec"), self.names)
            else:
                assert language == "sh", f"{page}: a block of {language!r} without a title would not be run"
                for command in text.splitlines():
                    self._run(command)
        return "\n".join(self.output)

    def _run(self, command: str) -> None:
        program, *arguments = shlex.split(command)
        assert program == "refract", command
        if arguments[-1] == "&":
            started = self.warm.start(arguments[:-1], cwd=self.folder, env=self.environment)
            self.servers.enter_context(_ended(started))
            _wait_until_ready(f"http://127.0.0.1:{self.port}/readyz", started)
            return
        done = self.warm.run(arguments, cwd=self.folder, env=self.environment, seconds=300)
        self.output.append(done.stdout)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


@contextlib.contextmanager
def _ended(server: Started) -> Iterator[None]:
    with server.output:
        yield
        server.kill()
    server.wait(30)


def _wait_until_ready(url: str, server: Started) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server did not become ready: exit code {server.poll()}")


@pytest.fixture
def reader(tmp_path: Path, new_tracking: Path, warm: WarmProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    shutil.copy(new_tracking, tmp_path / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as servers:
        yield Reader(tmp_path, warm, servers, port)


def test_first_classifier(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    output = reader.follow("first-classifier.md")
    assert "next: refract train digits.yaml" in output
    assert (reader.folder / "runs/first/report.html").is_file() and (reader.folder / "digits.preview.png").is_file()
    assert output.count("golden/00.png") == 2, "predicted by the bundle and by the server"
    assert reader.names["row"]["label"] in reader.names["bundle"].info.labels
    assert reader.names["bundle"].info.metrics["accuracy"] > 0.5


def test_fine_tune(reader: Reader) -> None:
    output = reader.follow("fine-tune.md")
    assert "model.mode" in output, "compare shows what differs"
    head, everything = (
        load_file(reader.folder / "runs" / name / "bundle/weights.safetensors") for name in ("head", "all")
    )
    differing = [name for name in head if not np.array_equal(head[name], everything[name])]
    assert any("classifier" not in name for name in differing), "the second training changes more than the head"


def test_policy(reader: Reader) -> None:
    output = reader.follow("policy.md")
    assert "degrees" in output
    assert (reader.folder / "grid.png").is_file()
    copies = sorted(path.name for path in (reader.folder / "out").glob("*.jpg"))
    assert len(copies) == 4
    assert all(
        (reader.folder / "out" / name).read_bytes() == (reader.folder / "again" / name).read_bytes() for name in copies
    )


def test_text(reader: Reader) -> None:
    reader.follow("text.md")
    assert reader.names["response"].json()["predictions"][0]["label"] in ("red", "blue", "circle", "square")


@pytest.mark.slow
def test_retrain(reader: Reader) -> None:
    output = reader.follow("retrain.md")
    assert "promoted: " in output
    assert len(list((reader.folder / "retrain/scans/runs").iterdir())) == 2


def test_few_images(reader: Reader) -> None:
    output = reader.follow("few-images.md")
    assert "embeddings computed: 70 in" in output
    assert "features" in output and "photos/test/flower/00.jpg" in output
    info = load_bundle(reader.folder / "runs/probe/bundle").info
    assert info.config["model"]["mode"] == "probe"
    assert info.metrics["accuracy"] > 0.9
