"""The fastest backend that agrees with float32 is chosen, and the choice is stored."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from installed_backends import INSTALLED, INT8, PACKAGES
from torch import Tensor

from refract.models.bundle.bundle import BundleError
from refract.models.features import FeatureClassifier
from refract.serve.http.app import create_app
from refract.serve.runtime import selection as choosing
from refract.serve.runtime.backends import onnx, quantised
from refract.serve.runtime.backends.base import INT8_AGREED, Backend
from refract.serve.runtime.backends.registry import BACKENDS
from refract.serve.runtime.backends.storage import store
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.engine import build as build_engine
from refract.serve.runtime.selection import choose

pytestmark = [
    pytest.mark.slow,  # together they take minutes: `make test-fast` has two
    pytest.mark.usefixtures("cache"),
]


@pytest.fixture(scope="module", autouse=True)
def exported_once() -> Iterator[None]:
    """Export the bundle's network to ONNX at most once: an export takes seconds. test_serve_backends.py tests exports."""
    networks: list[bytes] = []
    export = quantised.to_onnx

    def once(network: FeatureClassifier, images: Tensor) -> bytes:
        if not networks:
            networks.append(export(network, images))
        return networks[0]

    with pytest.MonkeyPatch.context() as patch:
        for module in (onnx, quantised):
            patch.setattr(module, "to_onnx", once)
        yield


def golden_images(engine: Engine) -> np.ndarray:
    return np.stack([engine.preprocess(golden.data) for golden in engine.bundle.golden_samples])


def asking(bundle, **options):
    engine = Engine(bundle)
    return choose(bundle, FeatureClassifier(bundle.classifier("cpu")), golden_images(engine), **options)


def replaced(**builds: Any) -> dict[str, Backend]:
    """BACKENDS with other build functions, which need no package and compute only logits, as those of plugins may."""
    fakes = {name: replace(BACKENDS[name], build=build, requires=None, embeds=False) for name, build in builds.items()}
    return {**BACKENDS, **fakes}


def test_the_fastest_backend_is_chosen_stored_and_reported(
    bundle, serving, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, choice = asking(bundle)
    alone = {name: rate for name, rate in choice.rates.items() if name.endswith("/1")}
    worth = {name: rate / choosing.WORTH for name, rate in choice.rates.items()} | alone
    if choosing.BATCH / max(alone.values()) < choosing.LONG_S:
        worth = alone
    assert worth[f"{choice.name}/{choice.threads}"] == max(worth.values()) and not choice.dropped
    assert {name.partition("/")[0] for name in choice.rates} == set(choosing.candidates(torch.device("cpu")))
    (choice_file,) = cache.glob("*/kept.json")
    assert json.loads(choice_file.read_text())["name"] == choice.name
    monkeypatch.setattr(choosing._Trial, "rate", lambda *_: choice.rate * 0.8)
    engine = Engine(bundle, backend="auto")
    assert engine.choice == choice and torch.get_num_threads() == choice.threads
    with serving(create_app(engine)) as client:
        assert client.get("/v1/model").json()["backend"]["name"] == choice.name


def test_two_threads_must_be_faster_by_a_factor(bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager",))
    short = choosing.BATCH / choosing.LONG_S
    for one, two, wanted in (
        (100.0, 110.0, 1),
        (100.0, 150.0, 2),
        (1.01 * short, 2 * short, 1),
        (0.9 * short, 1.5 * short, 2),
    ):
        speeds = iter([two, one])
        monkeypatch.setattr(choosing._Trial, "rate", lambda *_, speeds=speeds: next(speeds))
        assert asking(bundle, threads=2, cache=cache / str(two))[1].threads == wanted


def test_a_choice_made_on_a_busy_machine_is_repeated(bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([100.0, 1.0])
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager", "bf16"))
    monkeypatch.setattr(choosing._Trial, "rate", lambda *_: next(speeds))
    first = asking(bundle, threads=1)[1]
    assert (first.name, first.rate) == ("eager", 100.0)
    for now in (90.0, 20.0):
        speeds = iter([now])
        assert asking(bundle, threads=1)[1] == first, "as fast as before, or other processes use the machine now"
    speeds = iter([160.0, 180.0, 200.0])
    second = asking(bundle, threads=1)[1]
    assert (second.name, second.rate) == ("bf16", 200.0), (
        "faster: the machine was busy when it was chosen, both are timed again"
    )
    speeds = iter([20.0, 18.0])
    assert asking(bundle, threads=1)[1] == second, (
        "ten times slower, as plain PyTorch is: other processes use the machine now"
    )
    speeds = iter([50.0, 150.0, 150.0, 50.0])
    assert asking(bundle, threads=1)[1].name == "eager", "four times slower, and plain PyTorch is not"


def test_bfloat16_is_timed_only_if_the_cpu_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, tried in (({}, False), ({"avx512_bf16": True, "amx_bf16": False}, True), ({"bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        names = choosing.candidates(torch.device("cpu"))
        assert ("bf16" in names) == tried and {"eager", *INSTALLED} - {"openvino-bf16"} <= set(names)
        assert ("openvino-bf16" in names) == (tried and "openvino" in INSTALLED)


def test_auto_never_times_a_backend_of_8_bit_integers() -> None:
    names = choosing.candidates(torch.device("cpu"))
    assert not any(choosing.BACKENDS[name].int8 for name in names) and not set(choosing.INT8) & set(names)


def test_a_backend_that_differs_or_fails_is_dropped_with_its_reason(
    bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(classifier, example, folder):
        return lambda images: -classifier(images)

    def broken(classifier, example, folder):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(choosing, "BACKENDS", replaced(bf16=wrong, openvino=broken))
    monkeypatch.setattr(choosing, "candidates", lambda device: ("bf16", "openvino", "eager"))
    _, choice = asking(bundle)
    assert choice.name == "eager" and choice.dropped["openvino"] == "no such instruction"
    assert "changes a probability of the golden samples by" in choice.dropped["bf16"]
    with pytest.raises(BundleError, match="--backend bf16: changes .* from float32; the limit is 0.03"):
        asking(bundle, wanted="bf16")
    lenient = {name: replace(backend, agreed=1.0) for name, backend in replaced(bf16=wrong).items()}
    monkeypatch.setattr(choosing, "BACKENDS", lenient)
    with pytest.raises(
        BundleError, match=r"--backend bf16: predicts another label than float32 for \d+ of \d+ golden samples"
    ):
        asking(bundle, wanted="bf16")
    monkeypatch.setattr(choosing, "BACKENDS", replaced(bf16=wrong, openvino=broken))
    with pytest.raises(ValueError, match="is unknown; accepted are auto, int8, eager"):
        asking(bundle, wanted="quick")
    # A stored choice that fails is replaced.
    (choice_file,) = cache.glob("*/kept.json")
    choice_file.write_text(json.dumps({**json.loads(choice_file.read_text()), "name": "openvino"}))
    assert asking(bundle)[1].name == "eager"


def test_int8_times_all_installed_int8_backends(bundle) -> None:
    if not INT8:
        with pytest.raises(
            BundleError,
            match="openvino-int8 needs the package openvino: pip install .*; --backend onnx-int8 needs",
        ):
            asking(bundle, wanted="int8", threads=1)
        return
    _, choice = asking(bundle, wanted="int8", threads=1)
    assert choice.rates.keys() == {f"{name}/1" for name in INT8}
    assert choice.rate == max(choice.rates.values()) and choice.agreed == INT8_AGREED


def test_int8_chooses_the_faster_backend_that_agrees(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch stands for both backends, so their packages are not needed."""

    def broken(classifier, example, folder):
        raise RuntimeError("no such instruction")

    plain = dict.fromkeys(("openvino-int8", "onnx-int8"), BACKENDS["eager"].build)
    monkeypatch.setattr(choosing, "BACKENDS", replaced(**plain))
    for speeds, faster in (((90.0, 100.0), "onnx-int8"), ((100.0, 90.0), "openvino-int8")):
        given = iter(speeds)
        monkeypatch.setattr(choosing._Trial, "rate", lambda *_, given=given: next(given))
        _, choice = asking(bundle, wanted="int8", threads=1)
        assert choice.rates == {"openvino-int8/1": speeds[0], "onnx-int8/1": speeds[1]}
        assert choice.name == faster and choice.rate == max(speeds) and choice.agreed == INT8_AGREED
    monkeypatch.setattr(choosing._Trial, "rate", lambda *_: 1.0)
    monkeypatch.setattr(choosing, "BACKENDS", replaced(**{**plain, "openvino-int8": broken}))
    _, choice = asking(bundle, wanted="int8", threads=1)
    assert choice.name == "onnx-int8" and choice.dropped == {"openvino-int8": "no such instruction"}
    monkeypatch.setattr(choosing, "BACKENDS", replaced(**dict.fromkeys(plain, broken)))
    with pytest.raises(
        BundleError, match="--backend openvino-int8: no such.*; --backend onnx-int8: no such.*; use --backend auto"
    ):
        asking(bundle, wanted="int8")


def test_a_network_converted_by_this_start_is_not_converted_again(
    bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a network stored by an earlier start may be damaged, or belong to another network."""
    conversions: list[str] = []

    def wrong(classifier, example, folder, name):
        if not (folder / "kept.int8.onnx").exists():
            conversions.append(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "kept.int8.onnx").touch()
        return lambda images: -classifier(images)

    fakes = {name: partial(wrong, name=name) for name in choosing.INT8}
    monkeypatch.setattr(choosing, "BACKENDS", replaced(**fakes))
    for wanted in (
        ["openvino-int8"],
        ["openvino-int8"] * 2,
    ):  # the second start finds a stored network, and converts it again once
        with pytest.raises(BundleError, match="--backend openvino-int8: changes"):
            asking(bundle, wanted="int8")
        assert conversions == wanted
    assert caplog.text.count("converting it again") == 1


def test_cpu_backends_are_rejected_on_other_devices(bundle) -> None:
    classifier, images = bundle.classifier().to("meta"), golden_images(Engine(bundle))
    for name in ("openvino", "onnx", "int8"):
        with pytest.raises(BundleError, match=f"--backend {name} runs on cpu, not on meta; use one of auto"):
            choose(bundle, classifier, images, wanted=name)


def test_all_replicas_use_the_same_backend(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With separate choices, a prediction would depend on which replica was idle."""
    rates = iter([100.0, 90.0, *[80.0, 100.0] * 9])
    monkeypatch.setattr(choosing._Trial, "rate", lambda *_: next(rates))
    monkeypatch.setattr(choosing, "INT8", ("eager", "bf16"))
    engine = build_engine(bundle, ["cpu"], "int8", 3)
    assert [one.choice and one.choice.name for one in (engine, *engine.others)] == ["eager", None, None]


def test_an_unusable_cache_does_no_harm(bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder would be")
    for name in INSTALLED:
        assert asking(bundle, wanted=name)[1].name == name
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager",))
    assert asking(bundle)[1].rates


@pytest.mark.parametrize("name", [*(name for name in INSTALLED if name != "openvino-bf16"), *INT8])
def test_a_truncated_stored_network_is_converted_again(
    name: str, bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A power failure or a full disk truncates it. A past version then stored a choice without this backend. openvino-bf16 reads the
    network of openvino."""
    monkeypatch.setattr(choosing, "candidates", lambda device: (name,))
    assert asking(bundle)[1].name == name and "converting it again" not in caplog.text
    (folder,) = cache.iterdir()
    files = {file: file.read_bytes() for file in folder.iterdir() if file.name in BACKENDS[name].files}
    assert len(files) == len(BACKENDS[name].files)
    for cut in files:
        cut.write_bytes(files[cut][:100])
        choice = asking(bundle)[1]
        assert choice.name == name and not choice.dropped and "converting it again" in caplog.text
        caplog.clear()
        assert all(len(file.read_bytes()) > 1_000 for file in files)
        assert asking(bundle, wanted=name)[1].name == name and "converting it again" not in caplog.text


def test_a_stored_network_is_complete_with_concurrent_writers(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Containers that share a cache may have the same process id."""
    left, young = cache / "part-killed", cache / "part-at-work"
    for folder in (left, young):
        folder.mkdir(parents=True)
        (folder / "kept.onnx").touch()
    os.utime(left, (0, 0))

    def write(part: Path) -> None:
        with part.open("w") as file:
            store(cache, "onnx", lambda other: other.write_text("of another"))
            file.write("whole")
        assert (cache / "kept.onnx").read_text() == "of another"

    store(cache, "onnx", write)
    assert (cache / "kept.onnx").read_text() == "whole" and not caplog.text
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("the disk is full")))
    store(cache, "onnx", lambda part: part.write_text("other"))
    assert "is not stored: the disk is full" in caplog.text and (cache / "kept.onnx").read_text() == "whole"
    assert {file.name for file in cache.iterdir()} == {"kept.onnx", "part-at-work"}


@pytest.mark.parametrize("text", ["[", "null", "[" * 100_000, '{"name": ["eager"], "threads": 1}', "\xff"])
def test_an_invalid_stored_choice_is_replaced(text: str, bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager",))
    first = asking(bundle, threads=1)[1]
    (note,) = cache.glob("*/kept.json")
    note.write_text(text, "latin-1")
    assert asking(bundle, threads=1)[1].name == first.name and json.loads(note.read_text())["name"] == "eager"


def test_another_package_version_needs_a_new_choice(bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager",))
    for count, versions in ((1, {}), (1, {}), *((2 + i, {name: "99"}) for i, name in enumerate(("torch", *PACKAGES)))):
        monkeypatch.setattr(choosing, "version", lambda name, versions=versions: versions.get(name) or version(name))
        asking(bundle, threads=1)
        assert len(list(cache.iterdir())) == count


def test_a_choice_for_other_weight_bits_is_not_used(bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines may share a home directory and a CPU name: virtual machines may report only the CPU family."""
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager",))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for known, count in (({}, 1), ({"avx2": True}, 1), ({"avx2": True, "avx512_vnni": True}, 2)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        asking(bundle, threads=1)
        assert len(list(cache.iterdir())) == count


class Unsure(torch.nn.Module):
    """Two labels with almost equal probabilities, which are their own embedding."""

    classifier = None

    def __init__(self, hair: float) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([hair, 0.0]))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits.repeat(len(images), 1)
        return logits, logits


def test_a_backend_with_another_top_label_is_dropped_at_any_difference(
    bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hair = 1e-3 * bundle.info.temperature
    monkeypatch.setattr(choosing, "candidates", lambda device: ("bf16", "eager"))
    images = golden_images(Engine(bundle))
    for other, dropped in ((2 * hair, set()), (-hair, {"bf16"})):
        network = Unsure(other)
        monkeypatch.setattr(choosing, "BACKENDS", replaced(bf16=lambda *_, network=network: lambda x: network(x)[0]))
        _, choice = choose(bundle, Unsure(hair), images, threads=1, cache=cache / str(other))
        assert set(choice.dropped) == dropped


def test_a_choice_of_one_thread_does_not_limit_the_next(bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda device: ("eager",))
    torch.set_num_threads(1)
    _, choice = asking(bundle, threads=2)
    assert {"eager/1", "eager/2"} <= choice.rates.keys()
    (choice_file,) = cache.glob("*/kept.json")
    choice_file.write_text(json.dumps({**json.loads(choice_file.read_text()), "threads": "many"}))
    assert asking(bundle, threads=2)[1].threads in (1, 2), "an invalid stored choice is replaced"
