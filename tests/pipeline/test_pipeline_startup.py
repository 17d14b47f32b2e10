"""What a training process imports before its first step, and what its plugins can still import afterwards."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.warm_process import shared

# The first step of the training loop raises, so that the code after `main` runs in the process of the training.
FIRST_STEP = """
import sys, traceback
from torch.optim.optimizer import register_optimizer_step_pre_hook
from refract.cli import main

class FirstStep(BaseException): pass

def stop(*_):
    if any("lightning/pytorch/loops" in frame.filename for frame in traceback.extract_stack()): raise FirstStep

register_optimizer_step_pre_hook(stop)
try: sys.exit(f"the training ended before its first step, with exit code {main(sys.argv[1:])}")
except FirstStep: pass
costly = {"torchvision.models", "transformers", "scipy.signal", "timm", "onnxruntime", "s3fs", "gcsfs", "adlfs"}
print("STEP", sorted(costly & set(sys.modules)))

import torch, torchmetrics, torchvision.models, transformers
from refract.models.training.lightning_imports import Metric, MulticlassAccuracy
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure
image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print("IMAGE", StructuralSimilarityIndexMeasure()(image, image).item(), peak_signal_noise_ratio(image, image + 0.1, data_range=1.0).item())
print("SAME", torchmetrics.Accuracy("multiclass", num_classes=3).__class__ is MulticlassAccuracy, issubclass(torchmetrics.AUROC, Metric),
      torchmetrics.functional.accuracy.__name__, "Accuracy" in dir(torchmetrics), torchvision.models.resnet18.__name__)
try: torchmetrics.Acuracy
except AttributeError as error: print(error)
"""

OTHER_TORCHMETRICS = """
import sys
from refract.models.training.lightning_imports import defer_torchmetrics
for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]: del sys.modules[name]
sys.modules["torchmetrics.collections"] = None
defer_torchmetrics()
import torchmetrics
print(type(torchmetrics).__name__, torchmetrics.MetricCollection.__name__)
"""


@pytest.mark.slow
def test_a_training_imports_nothing_costly_before_its_first_step_and_all_of_torchmetrics_afterwards(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.yaml").write_text(
        "data: {source: digits, image_size: 16, workers: 0}\nmodel: {name: lenet5}\ntracking: {enabled: false}\n"
        "trainer: {max_epochs: 1, device: cpu}\n"
    )
    command = [sys.executable, "-c", FIRST_STEP, "train", "config.yaml"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "STEP []" in lines, done.stdout + done.stderr
    assert all(map(find_spec, ("s3fs", "gcsfs", "adlfs", "timm", "onnxruntime"))), "else they cannot be imported anyway"
    similarity, ratio = map(float, lines[-3].removeprefix("IMAGE ").split())
    assert (similarity, ratio) == (pytest.approx(1.0), pytest.approx(20.0, abs=0.01))
    assert lines[-2:] == [
        "SAME True True accuracy True resnet18",
        "module 'torchmetrics' has no attribute 'Acuracy'",
    ]


def test_a_torchmetrics_with_other_modules_is_imported_as_always(tmp_path: Path) -> None:
    out, errors = shared().popen([], cwd=tmp_path, code=OTHER_TORCHMETRICS).communicate()
    assert out == "module MetricCollection\n", errors


def test_a_comparison_of_runs_does_not_import_lightning() -> None:
    code = "import sys, refract.pipeline.evaluation.compare; print(sorted({'lightning', 'torchmetrics'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
