"""Every backend agrees with plain float32."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from installed_backends import INSTALLED, INT8
from torch import nn
from warm_process import shared

from refract.models.classifier import Classifier
from refract.models.conversion.instruction_sets import weight_bits
from refract.models.features import FeatureClassifier
from refract.models.registry import build
from refract.serve.runtime.backends import NAMES
from refract.serve.runtime.backends.base import AGREED, INT8_AGREED
from refract.serve.runtime.backends.registry import BACKENDS
from refract.serve.runtime.engine import Engine

pytestmark = [
    pytest.mark.slow,  # together they take minutes: `make test-fast` has two
    pytest.mark.usefixtures("stored_networks"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


@pytest.fixture
def stored_networks(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert the bundle's network once for each backend, and read it from the disk in the next test."""
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(folder))


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


def test_backends_send_no_telemetry(bundle, tmp_path: Path) -> None:
    """Test in a process that has not imported them. OpenVINO and ONNX Runtime store an id in the home directory before they send
    telemetry. Both send none in a CI, so its variables are removed."""
    names = [name for name in (*INSTALLED, *INT8) if name in ("openvino", *INT8)]  # the others use the same libraries
    code = (
        "import sys\nfrom refract.models.bundle.bundle import load_bundle\nfrom refract.serve.runtime.engine import Engine\n"
        "print([name for name in ('openvino', 'onnxruntime') if name in sys.modules])\n"
        f"for name in {names}: Engine(load_bundle({str(bundle.path)!r}), backend=name)\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    still = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS")
    plain = {key: value for key, value in os.environ.items() if key not in (*still, "REFRACT_CACHE_DIR")}
    home = tmp_path / "home"
    home.mkdir()
    assert output_of(code, env=plain | {"HOME": str(home)}) == "[]\n[]\n"
    assert {str(path.relative_to(home)) for path in (*home.iterdir(), *home.glob(".cache/*"))} == {
        ".cache",
        ".cache/refract",
    }


def test_a_signal_is_handled_after_another_thread_has_deleted_the_network(bundle, folder: Path) -> None:
    """OpenVINO frees the signal stack of the main thread."""
    code = (
        "import os, signal, sys, threading\nfrom refract.models.bundle.bundle import load_bundle\n"
        "from refract.serve.runtime.engine import Engine\n"
        "os.environ['REFRACT_CACHE_DIR'] = sys.argv[2]\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        "for name in sys.argv[3:]:\n"
        "    engines = [Engine(load_bundle(sys.argv[1]), backend=name)]\n"
        "    thread = threading.Thread(target=engines.clear)\n    thread.start()\n    thread.join()\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    assert output_of(code, str(bundle.path), str(folder), *INSTALLED) == "heard\n" * len(INSTALLED)


def output_of(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run Python code, which must not fail, in another process, and return its standard output."""
    process = shared().popen(arguments, cwd=ROOT, env=env, code=code)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_the_compiled_network_agrees(tmp_path: Path) -> None:
    """A batch of one image is compiled separately."""
    network, images = tiny(), torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        compiled = BACKENDS["compiled"].forward(network, images, tmp_path / "network")
        for count in (3, 1):
            for outputs, expected in zip(compiled(images[:count]), network(images[:count]), strict=True):
                torch.testing.assert_close(outputs, expected, atol=0.05, rtol=0.05)


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


WITHOUT_VNNI, WITH_VNNI = {"avx512_f": True, "avx512_vnni": False}, {"avx512_vnni": True}


@pytest.mark.parametrize(
    ("machine", "known", "bits"),
    [
        ("x86_64", {"avx2": True}, 7),
        ("AMD64", WITHOUT_VNNI, 7),
        ("x86_64", WITH_VNNI, 8),
        ("x86_64", {"avx_vnni": True}, 8),
        ("aarch64", {}, 8),
    ],
)
def test_weights_have_seven_bits_on_x86_without_vnni(
    machine: str, known: dict[str, bool], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert weight_bits() == bits


@pytest.mark.parametrize(("known", "largest"), [(WITHOUT_VNNI, 64), (WITH_VNNI, 127)], ids=["7 bits", "8 bits"])
def test_a_quantised_network_has_weights_of_that_many_bits(
    known: dict[str, bool], largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    BACKENDS["onnx-int8"].build(tiny(), images, tmp_path)
    network = onnx.load(tmp_path / "kept.int8.onnx").graph
    weights = [onnx.numpy_helper.to_array(one) for one in network.initializer if one.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(one.astype(int)).max()) for one in weights if one.ndim > 1) == largest


def test_int8_is_close_to_float32_for_the_largest_products(tmp_path: Path) -> None:
    """White images and the largest weights give products that saturate on a CPU that adds them in 16 bits."""
    classifier = tiny()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.fill_(0.01)
    images = torch.cat([torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 255)]).to(torch.uint8)
    with torch.inference_mode():
        wanted = classifier(images)
        for name in INT8:
            outputs = BACKENDS[name].build(classifier, images, tmp_path)(images)
            torch.testing.assert_close(
                outputs, wanted, rtol=0.03, atol=0.01, msg=lambda text, name=name: f"{name}: {text}"
            )


def tiny() -> FeatureClassifier:
    """A convolution and a linear layer for 8×8 images, with random weights."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    return FeatureClassifier(Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3)).eval()


def test_the_command_offers_every_backend() -> None:
    assert ("auto", *BACKENDS, "int8") == NAMES
