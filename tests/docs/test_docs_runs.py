"""The documented commands run, on small data; NOT_RUN has the reason for each that does not.

Each group of commands runs in one folder, in the order of its list. runs/NAME and the like are real folders there. The tutorials have
`test_docs_tutorials.py`.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from charts import DRAWN
from documented import BLOCK, ROOT, complete
from not_run import NOT_RUN, PROGRAMS_NOT_RUN
from PIL import Image
from run_groups import (
    AUGMENTATION,
    EVALUATION,
    EXPORT,
    FIRST_CONFIG,
    FIRST_TRAINING,
    GROUPS,
    LABELS,
    OPTIONS_OF_SERVE,
    OPTIONS_OF_TRAIN,
    RETRAINING,
    REVIEW,
    SERVING,
    TEXTS,
    TRAINING,
)
from warm_process import Started, WarmProcess

from refract.pipeline.labels.decisions import Decision
from refract.pipeline.labels.history import LabelHistory

CONFIG = {
    "data": {"source": "photos", "image_size": 32, "resize": "squash", "batch_size": 16, "workers": 0},
    "augment": {"policy": ["HorizontalFlip"]},
    "model": {"name": "lenet5"},
    "trainer": {"max_epochs": 1, "device": "cpu", "precision": "fp32"},
    "evaluation": {"robustness": "none"},
}
UNTRACKED = {"tracking": {"enabled": False}}
TRACKED = {
    "tracking": {"model_name": "photos"},
    "gate": {"margin": -1, "lowest_gain": -1, "recall_loss": 1, "robustness_loss": None, "latency_ratio": None},
}
COLORS = {"cat": (200, 90, 60), "dog": (60, 90, 200)}

SMALLER = (
    ("--trials 50", "--trials 1"),
    ("--jobs 2", "--jobs 1"),
    ("--jobs 8", "--jobs 1"),
)
"""What the tests shorten: (as documented, as run). Each worker process imports PyTorch."""

READY = re.compile(r"Refract serves .* on (\S+)|Review of .*: open (\S+);|next run ")
"""What a command prints that runs until it is stopped. The groups are its address."""


class Shell:
    """A user in a folder. `run` ends with the command, `start` stops a server at the end of the block."""

    def __init__(self, folder: Path, warm: WarmProcess) -> None:
        self.folder, self.warm = folder, warm
        self.environment = {**os.environ, DRAWN: "1", "HOME": str(folder / "home"), "REFRACT_SERVE_BACKEND": "eager"}
        self.environment["REFRACT_SERVE_SAMPLE_FRACTION"] = "1"
        self.environment.pop("MLFLOW_TRACKING_URI", None)

    def run(self, line: str, *more: str) -> str:
        """Return what the command prints. It must end with 0."""
        for documented, shorter in SMALLER:
            line = line.replace(documented, shorter)
        program, *arguments = shlex.split(line)
        if program == "refract":
            done = self.warm.run([*arguments, *more], cwd=self.folder, env=self.environment, seconds=120)
        else:
            program = {"python": sys.executable}.get(program, program)
            if shutil.which(program) is None:
                pytest.skip(
                    f"the documented command runs {program}, which is not installed (Debian: apt-get install {program})"
                )
            done = subprocess.run(
                [program, *arguments],
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def start(self, line: str) -> Iterator[str]:
        """Start a server on a free port, wait until it is ready, and yield its address without a final slash."""
        line = (
            re.sub(r" --port \d+", "", line)
            .replace("--metrics-port 9000", "--metrics-port 0")
            .replace("--grpc-port 8001", "--grpc-port 0")
        )
        program, *arguments = shlex.split(line)
        assert program == "refract"
        port = ["--port", "0"] if arguments[0] != "schedule" else []
        started = self.warm.start([*arguments, *port], cwd=self.folder, env=self.environment)
        with started.output:
            try:
                yield _address(started, line).rstrip("/")
            finally:
                started.terminate()
                started.wait(60)
        assert started.returncode == 0, f"{line}: exit code {started.returncode}"

    def run_or_start(self, line: str) -> str:
        """Run the command, or start and stop it if it runs until it is stopped."""
        if re.match(r"refract (serve|review|schedule(?! --list)) ", line):
            with self.start(line):
                return ""
        return self.run(line)


def _address(started: Started, line: str) -> str:
    printed = []
    for text in started.output:
        printed.append(text)
        if ready := READY.search(text):
            return ready[1] or ready[2] or ""
    raise AssertionError(f"{line}: ended before it was ready\n{''.join(printed)}")


def paint(folder: Path, labels: Mapping[str, tuple[int, int, int]] = COLORS, numbers: range = range(50)) -> None:
    """Write folder/LABEL/NN.jpg: noisy patches of the label's color."""
    for label, color in labels.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            noise = np.random.default_rng([number, *color]).normal(0, 40, (24, 24 + number % 5, 3))
            Image.fromarray((color + noise).clip(0, 255).astype(np.uint8)).save(folder / label / f"{number:02}.jpg")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> Path:
    """A folder with photos/, photos.yaml, some files, and the finished run runs/NAME."""
    folder = tmp_path_factory.mktemp("documented")
    paint(folder / "photos")
    (folder / "photos.yaml").write_text(yaml.safe_dump({**CONFIG, **UNTRACKED}))
    (folder / "mine.yaml").write_text("- HorizontalFlip: {p: 0.5}\n- Rotate: {degrees: 10}\n")
    paint(folder / "others", numbers=range(60, 62))
    (folder / "inbox").mkdir()
    for name, number in (("new.jpg", 60), ("photo.jpg", 61), ("a.jpg", 60), ("inbox/new.jpg", 61)):
        shutil.copy(folder / "others" / "cat" / f"{number}.jpg", folder / name)
    (folder / "keys").write_text("0123456789abcdef0123456789abcdef  # ann\n")
    Shell(folder, warm).run(FIRST_TRAINING[0], "--trainer.run_name", "NAME")
    return folder


@pytest.fixture
def shell(trained: Path, tmp_path: Path, warm: WarmProcess) -> Shell:
    """A shell in a copy of `trained`."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return Shell(tmp_path, warm)


def test_every_documented_command_is_run_or_has_a_reason() -> None:
    documented_lines = {c.line for c in complete() if not c.page.startswith("docs/tutorials/")}
    run = {line for group in GROUPS for line in group}
    others = {line for line in documented_lines - run if line.startswith(PROGRAMS_NOT_RUN)}
    assert len(run) > 90
    assert sorted(documented_lines - run - others - set(NOT_RUN)) == [], "neither run here nor in NOT_RUN with a reason"
    assert sorted(run - documented_lines) == [], "no page documents these any more"
    assert sorted(set(NOT_RUN) - documented_lines) == [], "no page documents these any more: remove them from NOT_RUN"
    assert sorted(set(NOT_RUN) & run) == []
    assert [prefix for prefix in PROGRAMS_NOT_RUN if not any(line.startswith(prefix) for line in others)] == []
    assert all(len(reason.split()) > 3 for reason in NOT_RUN.values())


def test_programs_of_the_repository_exist() -> None:
    """What is not run, as it takes hours or changes the environment, exists at least."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line in {c.line for c in complete()}:
        words = line.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            path = ROOT / words[2].replace(".", "/")
            file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
            text = "".join(part.read_text("utf-8") for part in {file, *file.parent.glob("*.py")} if part.exists())
            assert file.exists(), line
            assert [option for option in re.findall(r" (--[a-z-]+)", line) if option not in text] == [], line


def _example_of(page: str, start: str) -> str:
    """The code block of the page that begins with `start`."""
    text = (ROOT / page).read_text("utf-8")
    return next(block for _, block in BLOCK.findall(text) if block.startswith(start))


def test_augmentation(shell: Shell) -> None:
    (shell.folder / "my_plugin.py").write_text(_example_of("docs/plugins.md", "import csv"))
    for line in AUGMENTATION:
        shell.run(line)
    assert len(list((shell.folder / "again").rglob("*.jpg"))) == 500


def test_a_first_config(shell: Shell) -> None:
    shutil.rmtree(shell.folder / "photos.yaml", ignore_errors=True)
    for line in FIRST_CONFIG:
        (shell.folder / "photos.yaml").unlink(missing_ok=True)
        shell.run(line)


def test_labels(shell: Shell) -> None:
    for line in LABELS:
        if "--to 57" in line:
            history = LabelHistory(str(shell.folder / "labels.db"))
            for number in range(60 - len(history.decisions())):
                history.append(Decision(content=f"{number:064x}", path=f"{number}.jpg", action="skip", reviewer="ann"))
        if "import" in line:
            shutil.copy(shell.folder / "labels.json", shell.folder / "project.json")
        shell.run(line)


def test_training(shell: Shell) -> None:
    (shell.folder / "classes.csv").write_text(_example_of("docs/hierarchy.md", "label,parent"))
    colors = {"beagle": (0, 60, 0), "boxer": (80, 60, 40), "siamese": (160, 60, 80), "parrot": (240, 60, 120)}
    paint(shell.folder / "pets", colors, range(15))
    pets = {**CONFIG, **UNTRACKED, "data": {**CONFIG["data"], "source": "pets"}}
    (shell.folder / "pets.yaml").write_text(yaml.safe_dump(pets))
    (shell.folder / "space.yaml").write_text("optim.lr: {low: 1e-3, high: 1e-2, log: true}\n")
    for line in (_together(OPTIONS_OF_TRAIN), *TRAINING):
        if "--resume runs/" in line:
            _unfinish(shell.folder / line.split()[-1] / "run.json")
        shell.run(line)


def _together(lines: Sequence[str]) -> str:
    """One command with the options of all."""
    return " ".join([lines[0], *(" ".join(line.split()[3:]) for line in lines[1:])])


def _unfinish(record: Path) -> None:
    """Make a run one that was killed while it wrote its bundle. record: its run.json."""
    values = json.loads(record.read_text("utf-8"))
    values.pop("finished", None)
    record.write_text(json.dumps(values))
    shutil.rmtree(record.with_name("bundle"), ignore_errors=True)


def test_evaluation(shell: Shell) -> None:
    for name in "abc":
        shutil.copytree(shell.folder / "runs/NAME", shell.folder / "runs" / name)
    for name in ("new", "photos-of-today"):
        shutil.copytree(shell.folder / "photos", shell.folder / name)
    for line in EVALUATION:
        if line.startswith(("refract soup", "refract score")):
            shutil.rmtree(shell.folder / "runs/soup", ignore_errors=True)
            (shell.folder / "scores.parquet").unlink(missing_ok=True)
        shell.run(
            line,
            *(("--jobs", "1") if line.startswith(("refract embed", "refract score")) and "--jobs" not in line else ()),
        )


def test_retraining(shell: Shell, new_tracking: Path) -> None:
    shutil.copy(new_tracking, shell.folder / "mlflow.db")
    (shell.folder / "photos.yaml").write_text(yaml.safe_dump({**CONFIG, **TRACKED}))
    for line in RETRAINING:
        if "start_from" in line:
            paint(shell.folder / "photos", numbers=range(50, 56))
        shell.run_or_start(line.replace("photos 7", "photos 1"))


def test_texts(shell: Shell) -> None:
    shutil.copytree(ROOT / "configs", shell.folder / "configs")
    shutil.copytree(ROOT / "benchmarks", shell.folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    *pairs, predict, multipart, as_json, as_text = TEXTS
    for name, make, train in (("texts", *pairs[:2]), ("captions", *pairs[2:])):
        shell.run(make)
        table = shell.folder / name / f"{name}.csv"
        table.write_text("".join(table.read_text("utf-8").splitlines(keepends=True)[:120]), "utf-8")
        shutil.rmtree(shell.folder / "runs", ignore_errors=True)
        shell.run(train, "--trainer.max_epochs", "1", "--trainer.run_name", "NAME", "--tracking.enabled", "false")
    shutil.copy(next((shell.folder / "captions").rglob("*.png")), shell.folder / "a.png")
    shell.run(predict)
    with shell.start("refract serve runs/NAME/bundle") as address:
        for request in (multipart, as_json, as_text):
            assert '"label"' in shell.run(request.replace("localhost:8000", address))


def test_serving(shell: Shell) -> None:
    images = sorted((shell.folder / "photos").rglob("*.jpg"))[::3]
    sample, drift, *servers, predict, feedback = SERVING
    with shell.start(sample) as address:
        shell.run(" ".join(["refract", "predict", "--url", address, *map(str, images)]))
        shell.run(predict.replace("http://localhost:8000", address))
        head = shell.run(f"curl -s -D - -o /dev/null -F file=@new.jpg {address}/v1/predict")
        request = re.search(r"(?i)^x-request-id: (\S+)", head, re.MULTILINE)
        assert request is not None
        (shell.folder / "labels.csv").write_text(f"id,labels\n{request[1]},cat\n")
        shell.run(feedback.replace("http://localhost:8000", address))
    shell.run(drift)
    for line in (_together(OPTIONS_OF_SERVE), *servers):
        shell.run_or_start(line)


def test_review(shell: Shell) -> None:
    runs = shell.folder / "runs"
    for name in ("photos", "photos-20260101-020000-00"):
        shutil.copytree(runs / "NAME", runs / name)
    with shell.start("refract serve runs/NAME/bundle --sample captured --sample-below 1") as address:
        shell.run(f"refract predict --url {address} new.jpg")
    pretrained = {"name": "timm/tf_efficientnet_lite0", "weights": "default"}
    (shell.folder / "photos.yaml").write_text(yaml.safe_dump({**CONFIG, **UNTRACKED, "model": pretrained}))
    *reviews, queue, decided = REVIEW
    for line in reviews:
        with shell.start(line) as address:
            if "keys" not in line:
                for request in (queue, decided):
                    shell.run(request.replace("http://localhost:8100", address))


def test_export(shell: Shell) -> None:
    """The commands, then the code of each client in the folder of its export: all predict the same label."""
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"needs the extra {'onnx' if package == 'onnxruntime' else package}")
    for line in EXPORT:
        shell.run(line)
    text = (ROOT / "docs/export.md").read_text("utf-8")
    clients = [block for language, block in BLOCK.findall(text) if language == "python"]
    printed = []
    for name, client in zip(("onnx", "openvino", "torch"), clients, strict=True):
        shutil.copy(shell.folder / "photo.jpg", shell.folder / "exported" / name / "photo.jpg")
        done = subprocess.run(
            [sys.executable, "-c", client],
            cwd=shell.folder / "exported" / name,
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{name}\n{done.stderr}"
        label, probability = done.stdout.split()
        printed.append((label, round(float(probability), 3)))
    assert len({*printed}) == 1 and printed[0][0] in ("cat", "dog"), printed
