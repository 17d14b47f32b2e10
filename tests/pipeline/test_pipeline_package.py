"""The package installs one top-level name, and works in folders that contain modules of the same names."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_data import COLORS, make_image, write_image
from warm_process import WarmProcess

from refract.models.bundle.bundle import load_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and with modules named like the four packages."""
    folder = tmp_path_factory.mktemp("crowded")
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text("raise RuntimeError('the models of the user')\n")
    for name in ("serve", "augment", "pipeline"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the {name} of the user')\n")
    for label in COLORS:
        for number in range(20):
            write_image(folder / "images" / label / f"{number:02}.png", make_image(label, number))
    return folder


def run(*command: str | Path, cwd: Path, path: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_trains_a_plugins_network_in_a_folder_with_modules_of_the_same_names(crowded: Path) -> None:
    (crowded / "mine.py").write_text(
        "import math\nfrom torch import nn\nfrom refract.plugins import network\n\n@network\n"
        "def Flat(num_classes, *, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * math.prod(image_size), num_classes))\n"
    )
    (crowded / "c.yaml").write_text(
        "plugins: [mine.py]\nmodel: {name: Flat}\n"
        "data: {source: images, image_size: 16, batch_size: 8, workers: 1, memory: never}\n"
        "trainer: {max_epochs: 1, device: cpu, devices: 2, run_name: r}\ntracking: {enabled: false}\nevaluation: {robustness: none}\n"
    )
    run("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "refract", "train", "c.yaml", cwd=crowded)
    assert [plugin["name"] for plugin in load_bundle(crowded / "runs" / "r" / "bundle").info.plugins] == ["mine.py"]


def test_a_script_uses_the_public_names_in_such_a_folder(crowded: Path) -> None:
    (crowded / "script.py").write_text(
        "import sys\nimport refract\nassert 'torch' not in sys.modules\n"
        "from refract import Augmenter, Client, load_bundle, load_policy\nimport numpy as np\n"
        "image = Augmenter('imagenet', seed=1, size=16)(np.zeros((20, 20, 3), np.uint8), epoch=0, index=0)\n"
        "print(image.shape, load_policy('digits') is not None, Client.__name__, load_bundle.__name__)\n"
    )
    assert run("script.py", cwd=crowded) == "(16, 16, 3) True Client load_bundle\n"


@pytest.mark.slow
def test_the_wheel_contains_only_refract_and_works_alone(crowded: Path, tmp_path: Path, new_tracking: Path) -> None:
    """Build from the repository, and from the source distribution, which must be complete. The demo trains for fewer epochs."""
    run("-m", "hatchling", "build", "-d", tmp_path / "one", cwd=ROOT)
    (wheel,) = (tmp_path / "one").glob("*.whl")
    (source,) = (tmp_path / "one").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (unpacked,) = (tmp_path / "source").iterdir()
    run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "two", cwd=unpacked)
    (again,) = (tmp_path / "two").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        assert {name.partition("/")[0].partition("-")[0] for name in one.namelist()} == {"refract"}
    run("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    place = run("-c", "import refract; print(refract.__file__)", cwd=crowded, path=tmp_path / "site")
    assert place.startswith(str(tmp_path / "site")), "not the checkout"
    config = tmp_path / "site/refract/pipeline/configs/digits.yaml"
    config.write_text(config.read_text().replace("max_epochs: 30", "max_epochs: 12"))
    shutil.copy(new_tracking, crowded / "mlflow.db")
    out = run("-m", "refract", "demo", cwd=crowded, path=tmp_path / "site", REFRACT_SERVE_BACKEND="eager")
    assert "of 10 correct" in out and "mlflow ui" in out and "refract serve" in out
    (bundle,) = crowded.glob("runs/digits*/bundle")
    info = load_bundle(bundle).info
    assert info.config["trainer"]["max_epochs"] == 12, "the config of the wheel"
    assert info.metrics["accuracy"] >= 0.98


def test_nothing_imports_a_package_by_its_former_name(warm: WarmProcess, tmp_path: Path) -> None:
    code = (
        "import sys, refract.cli, refract.serve.http.app, refract.pipeline.training.run\n"
        "print({'augment', 'models', 'pipeline', 'serve'} & set(sys.modules))"
    )
    process = warm.popen([], cwd=tmp_path, code=code)
    with process.stdout, process.stderr:
        assert process.communicate()[0] == "set()\n"
