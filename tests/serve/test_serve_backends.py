"""Every backend agrees with plain float32."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from installed_backends import INSTALLED, INT8
from torch import nn

from refract.models.classifier import Classifier
from refract.models.features import FeatureClassifier
from refract.models.registry import build
from refract.serve.runtime.backends.base import AGREED, INT8_AGREED
from refract.serve.runtime.backends.registry import BACKENDS
from refract.serve.runtime.engine import Engine

pytestmark = [
    pytest.mark.slow,  # together they take minutes: `make test-fast` has two
    pytest.mark.usefixtures("cache"),
]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["eager", "bf16", *INSTALLED, *INT8])
def test_a_backend_agrees_with_float32_at_every_batch_size(name: str, bundle, make_image) -> None:
    plain, other = Engine(bundle), Engine(bundle, backend=name)
    other.self_test()
    images = np.stack([plain.preprocess(make_image(i)) for i in range(7)])
    for count in (1, 7, 2):
        agreed = {"openvino": 1e-5, "onnx": 1e-5, **dict.fromkeys(INT8, INT8_AGREED)}.get(name, AGREED)
        outputs, expected = other.compute(images[:count]), plain.compute(images[:count])
        np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=agreed)
        assert (cosine(outputs["embedding"], expected["embedding"]) >= 0.99).all()
        assert outputs["embedding"].shape == (count, 84)
    if name != "eager":
        assert other.choice is not None and other.choice.name == name


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.parametrize("names", [INSTALLED, INT8], ids=["float", "int8"])
def test_backends_send_no_telemetry(names: list[str], bundle, tmp_path: Path) -> None:
    """Test in a new process, which has not imported them. OpenVINO and ONNX Runtime store an id in the home directory before they send
    telemetry. Both send none in a CI, so its variables are removed."""
    code = (
        "import sys\nfrom refract.models.bundle.bundle import load_bundle\nfrom refract.serve.runtime.engine import Engine\n"
        f"for name in {names}: Engine(load_bundle({str(bundle.path)!r}), backend=name)\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    still = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS")
    plain = {key: value for key, value in os.environ.items() if key not in still}
    command, environment = [sys.executable, "-c", code], plain | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert {str(path.relative_to(tmp_path)) for path in (*tmp_path.iterdir(), *tmp_path.glob(".cache/*"))} == {
        ".cache",
        ".cache/refract",
    }


def test_a_signal_is_handled_after_another_thread_has_deleted_the_network(bundle, tmp_path: Path) -> None:
    """OpenVINO frees the signal stack of the main thread."""
    code = (
        "import signal, sys, threading\nfrom pathlib import Path\nfrom refract.models.bundle.bundle import load_bundle\n"
        "from refract.serve.runtime import selection\nfrom refract.serve.runtime.engine import Engine\n"
        "selection.CACHE = Path(sys.argv[2])\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        "for name in sys.argv[3:]:\n"
        "    engines = [Engine(load_bundle(sys.argv[1]), backend=name)]\n"
        "    thread = threading.Thread(target=engines.clear)\n    thread.start()\n    thread.join()\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    command = [sys.executable, "-c", code, str(bundle.path), str(tmp_path / "cache"), *INSTALLED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n" * len(INSTALLED)), done.stderr


def test_the_compiled_network_agrees(bundle, make_image) -> None:
    plain, other = Engine(bundle), Engine(bundle, backend="compiled")
    images = np.stack([plain.preprocess(make_image(i)) for i in range(3)])
    for count in (1, 3):
        np.testing.assert_allclose(other.predict(images[:count]), plain.predict(images[:count]), atol=AGREED)


def test_bfloat16_keeps_layers_in_float32_that_disable_autocast() -> None:
    classifier = FeatureClassifier(
        Classifier(build("fastnet", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.25,) * 3)
    ).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        outputs = BACKENDS["bf16"].build(classifier, images, Path())(images)
        torch.testing.assert_close(outputs, classifier(images), atol=0.05, rtol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in classifier.parameters()), (
        "that of others is not touched"
    )


@pytest.mark.parametrize("name", ["eager", "bf16", *INSTALLED, *INT8])
def test_concurrent_threads_get_their_own_predictions(name: str, bundle, make_image) -> None:
    """A self-test, or a model worker that retires, computes concurrently with the served model."""
    engine = Engine(bundle, backend=name)
    images = [engine.preprocess(make_image(i))[None] for i in range(2)]
    wanted = [engine.predict(image) for image in images]
    with ThreadPoolExecutor(2) as pool:
        rounds = [pool.submit(lambda k: [engine.predict(images[k]) for _ in range(200)], k) for k in (0, 1)]
        for k, done in enumerate(rounds):
            for row in done.result():
                np.testing.assert_allclose(row, wanted[k], atol=1e-4)


def test_a_network_with_3d_convolutions_runs_in_bfloat16() -> None:
    """Its weights have five dimensions, for which the four-dimensional channels-last order does not exist."""
    network = build("cnn", 3, image_size=(32, 32), widths=[4, 8], conv="3d")
    classifier = FeatureClassifier(Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        outputs = BACKENDS["bf16"].build(classifier, images, Path())(images)
        torch.testing.assert_close(outputs, classifier(images), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("machine", "known", "most"),
    [
        ("x86_64", {"avx2": True}, 64),
        ("AMD64", {"avx512_f": True, "avx512_vnni": False}, 64),
        ("x86_64", {"avx512_vnni": True}, 127),
        ("x86_64", {"avx_vnni": True}, 127),
        ("aarch64", {}, 127),
    ],
)
def test_weights_have_seven_bits_on_x86_without_vnni(
    machine: str, known: dict[str, bool], most: int, bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    BACKENDS["onnx-int8"].build(FeatureClassifier(bundle.classifier(torch.device("cpu"))), images, tmp_path)
    network = onnx.load(tmp_path / "kept.int8.onnx").graph
    weights = [onnx.numpy_helper.to_array(one) for one in network.initializer if one.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(one.astype(int)).max()) for one in weights if one.ndim > 1) == most


@pytest.mark.parametrize("name", INT8)
def test_int8_is_close_to_float32_for_the_largest_products(name: str, tmp_path: Path) -> None:
    """White images and the largest weights give products that saturate on a CPU that adds them in 16 bits."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.01)
    classifier = FeatureClassifier(Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3)).eval()
    images = torch.cat([torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 255)]).to(torch.uint8)
    with torch.inference_mode():
        wanted = classifier(images)
        outputs = BACKENDS[name].build(classifier, images, tmp_path)(images)
    torch.testing.assert_close(outputs, wanted, rtol=0.03, atol=0.01)
