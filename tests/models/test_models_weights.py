"""Weights from a file: the same head, another head, foreign prefixes, and files that do not fit."""

import http.server
import json
import logging
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from refract.models.pretrained.weights import load_weights, read_weights
from refract.models.pretrained.weights_files import FOLDER_FILES
from refract.models.registry import build, head_of, weights_preprocess

SIZE = (32, 32)


def save(path: Path, tensors: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def same(network: nn.Module, other: nn.Module, *, but: tuple[str, ...] = ()) -> bool:
    ours, theirs = network.state_dict(), other.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours if key not in but)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm/resnet10t"])
def test_the_same_head_loads_whole(name: str, suffix: str, tmp_path: Path) -> None:
    source = build(name, 4, image_size=SIZE)
    network = build(name, 4, image_size=SIZE, weights=save(tmp_path / f"w{suffix}", source.state_dict()))
    assert same(network, source)


@pytest.mark.parametrize(("name", "head"), [("resnet20", "head"), ("resnet18", "fc"), ("timm/resnet10t", "fc")])
def test_another_head_is_reinitialised_and_reported(
    name: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build(name, 4, image_size=SIZE)
    path = save(tmp_path / "w.safetensors", source.state_dict())
    with caplog.at_level(logging.INFO, logger="refract.models.pretrained.weights"):
        network = build(name, 6, image_size=SIZE, weights=path)
    keys = (f"{head}.weight", f"{head}.bias")
    assert same(network, source, but=keys)
    assert head_of(network).weight.shape[0] == 6
    assert f"freshly initialised: {', '.join(keys)}" in caplog.text


def test_the_report_names_every_tensor(tmp_path: Path) -> None:
    source, network = build("lenet5", 4, image_size=SIZE), build("lenet5", 6, image_size=SIZE)
    path = save(tmp_path / "w.safetensors", {**source.state_dict(), "mean": torch.zeros(3)})
    report = load_weights(network, head_of(network), path)
    assert report.reinitialised == ("head.weight", "head.bias")
    assert set(report.skipped) == {"mean", "head.weight", "head.bias"}
    assert set(report.loaded) | set(report.reinitialised) == set(network.state_dict())


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "network.", "classifier.network."]
)
def test_foreign_prefixes_are_cut(prefix: str, tmp_path: Path) -> None:
    source = build("resnet20", 3, image_size=SIZE)
    path = save(tmp_path / "w.pt", {prefix + key: tensor for key, tensor in source.state_dict().items()})
    assert same(build("resnet20", 3, image_size=SIZE, weights=path), source)


def test_a_head_named_like_a_prefix_is_not_cut(tmp_path: Path) -> None:
    name = "timm/mobilenetv3_small_050"
    source = build(name, 3, image_size=SIZE)
    path = save(tmp_path / "w.pt", {"model." + key: tensor for key, tensor in source.state_dict().items()})
    assert same(build(name, 3, image_size=SIZE, weights=path), source)


def test_a_checkpoints_state_dict_is_found(tmp_path: Path) -> None:
    source = build("lenet5", 3, image_size=SIZE)
    torch.save({"epoch": 3, "state_dict": source.state_dict()}, tmp_path / "w.pth")
    assert same(build("lenet5", 3, image_size=SIZE, weights=str(tmp_path / "w.pth")), source)


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pt", build("lenet5", 3, image_size=SIZE).state_dict())
    with pytest.raises(ValueError, match=r"no key fits the network; the file starts with .'features.0.weight'"):
        build("resnet18", 3, image_size=SIZE, weights=path)


def test_a_backbone_that_differs_is_refused_and_named(tmp_path: Path) -> None:
    # 48×48 images leave lenet5's first linear layer more numbers: the head fits, the neck does not.
    path = save(tmp_path / "w.pt", build("lenet5", 3, image_size=(48, 48)).state_dict())
    with pytest.raises(ValueError, match=r"1 keys outside the head differ: neck.1.weight \(120, 1296\)"):
        build("lenet5", 3, image_size=SIZE, weights=path)


def test_missing_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    weights = build("lenet5", 3, image_size=SIZE).state_dict()
    weights["extra.weight"] = weights.pop("features.0.weight")
    path = save(tmp_path / "w.pt", weights)
    with pytest.raises(ValueError, match=r"features.0.weight missing, extra.weight unknown"):
        build("lenet5", 3, image_size=SIZE, weights=path)


class Payload:
    """A pickle that would run code when loaded."""

    def __reduce__(self) -> tuple:
        return (print, ("the pickle's code ran",))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    torch.save({"a": Payload()}, tmp_path / "v.pth")
    for name in ("w.pth", "v.pth"):
        with pytest.raises(ValueError, match=r"cannot be read as plain tensors"):
            build("lenet5", 3, image_size=SIZE, weights=str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"'none', 'default', a URL such as hf://OWNER/NAME, a folder with .*, or a path that ends in .safetensors, .pt, .pth, .bin",
    ):
        build("lenet5", 3, image_size=SIZE, weights="imagenet")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt"):
        build("lenet5", 3, image_size=SIZE, weights=str(tmp_path / "nowhere.pt"))
    (tmp_path / "w.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"cannot be read as plain tensors"):
        build("lenet5", 3, image_size=SIZE, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_a_folder_as_the_hub_lays_it_out(name: str, tmp_path: Path) -> None:
    source = build("resnet18", 4, image_size=SIZE)
    save(tmp_path / name, source.state_dict())
    assert same(build("resnet18", 4, image_size=SIZE, weights=str(tmp_path)), source)


def test_a_url_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    source = build("lenet5", 4, image_size=SIZE)
    path = Path(save(tmp_path / "served" / "w.safetensors", source.state_dict()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(path.parent), **kwargs)

        def log_message(self, form: str, *args) -> None:
            asked.append(form % args)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/w.safetensors"
        for _ in range(2):
            assert same(build("lenet5", 4, image_size=SIZE, weights=url), source)
        assert len(asked) == 1
        # Two keys may name two files. A stored run has the masked address, which finds the copy again.
        for key in ("exp1", "exp2"):
            assert same(build("lenet5", 4, image_size=SIZE, weights=f"{url}?key={key}"), source)
        assert len(asked) == 3
        assert same(build("lenet5", 4, image_size=SIZE, weights=f"{url}?key=***"), source) and len(asked) == 3
        with pytest.raises(ValueError, match="did not store the URL's credentials"):
            build("lenet5", 4, image_size=SIZE, weights=f"{url}?other=1&key=***")
        with pytest.raises(ValueError, match=r"other.safetensors' cannot be downloaded: .*404"):
            build("lenet5", 4, image_size=SIZE, weights=url.replace("/w.", "/other."))
        server.shutdown()
    with pytest.raises(ValueError, match="expected the URL of a file that ends in"):
        build("lenet5", 4, image_size=SIZE, weights="https://example.org/page.html")


def test_weights_of_a_grey_network_are_fitted_to_colour(tmp_path: Path) -> None:
    source = build("resnet18", 4, image_size=SIZE)
    state = source.state_dict()
    grey = state["conv1.weight"].sum(dim=1, keepdim=True)
    path = save(tmp_path / "grey.safetensors", {**state, "conv1.weight": grey})
    network = build("resnet18", 4, image_size=SIZE, weights=path).eval()
    # A grey image, its three channels alike, gives what the grey network gave.
    images = torch.randn(2, 1, *SIZE).expand(2, 3, *SIZE)
    torch.testing.assert_close(network(images), source.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_new_kind_of_head_goes_on_a_loaded_backbone(tmp_path: Path) -> None:
    source = build("resnet20", 4, image_size=SIZE)
    path = save(tmp_path / "w.pth", source.state_dict())
    network = build("resnet20", 7, image_size=SIZE, weights=path, head="cosine")
    assert torch.equal(network.stem[0].weight, source.stem[0].weight)
    assert network(torch.randn(1, 3, *SIZE)).shape == (1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mlp", "cosine"])
@pytest.mark.parametrize("name", ["resnet20", "timm/mobilenetv3_small_050"])  # the second's head is named `classifier`
@pytest.mark.parametrize("prefix", ["network.", "classifier.network.", ""])
def test_weights_with_a_head_of_another_kind_load(prefix: str, name: str, head: str, tmp_path: Path) -> None:
    source = build(name, 3, image_size=(32, 32), head=head)
    torch.save({f"{prefix}{key}": value for key, value in source.state_dict().items()}, tmp_path / "w.pt")
    same = build(name, 3, image_size=(32, 32), head=head, weights=str(tmp_path / "w.pt"))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in same.state_dict().items())
    other = build(name, 5, image_size=(32, 32), weights=str(tmp_path / "w.pt"))
    assert torch.equal(next(other.parameters()), next(source.parameters()))


def test_two_heads_are_not_swapped_by_halves() -> None:
    with pytest.raises(ValueError, match="has two heads"):
        build("timm/deit_tiny_distilled_patch16_224", 3, image_size=(224, 224), head="cosine")


def test_mean_and_deviation_come_from_a_folders_own_record(tmp_path: Path) -> None:
    assert weights_preprocess("resnet20", str(tmp_path)) is None
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    assert weights_preprocess("resnet20", str(tmp_path)) == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    bundle_record = {"preprocess": {"mean": [0.7, 0.7, 0.7], "std": [0.2, 0.2, 0.2], "normalize": "channel"}}
    (tmp_path / "bundle.json").write_text(json.dumps(bundle_record))
    assert weights_preprocess("resnet20", str(tmp_path)) == {"mean": [0.7] * 3, "std": [0.2] * 3}
    bundle_record["preprocess"]["normalize"] = "pca"
    (tmp_path / "bundle.json").write_text(json.dumps(bundle_record))
    preprocess = weights_preprocess("resnet20", str(tmp_path))
    assert preprocess == {"mean": [0.7] * 3, "std": [0.2] * 3, "normalize": "pca"}
    (tmp_path / "bundle.json").unlink()
    record = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "normalize": true}'
    (tmp_path / "preprocessor_config.json").write_text(record)
    assert weights_preprocess("resnet20", str(tmp_path)) == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "bundle").mkdir(parents=True)
    save(run / "bundle" / "weights.safetensors", {})
    with pytest.raises(ValueError, match="the path does not exist; expected 'none'"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a run's folder; did you mean '.*run/bundle'"):
        read_weights(run)


def test_the_error_for_a_bundle_names_its_network(tmp_path: Path) -> None:
    given, other = (
        build("cnn", 3, image_size=(32, 32), widths=[8, 8]),
        build("cnn", 3, image_size=(32, 32), widths=[8, 4]),
    )
    safetensors.torch.save_file(given.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "bundle.json").write_text(
        '{"network": {"name": "cnn", "args": {"widths": [8, 8]}, "image_size": [32, 32]}}'
    )
    for network in (other, build("lenet5", 3, image_size=(32, 32))):
        with pytest.raises(
            ValueError, match=r'model.name: cnn, model.args: \{"widths": \[8, 8\]\}, data.image_size: \[32, 32\]$'
        ):
            load_weights(network, head_of(network), tmp_path)


def test_keys_of_another_network_are_refused_though_they_hold_the_heads_name(tmp_path) -> None:
    network = build("timm/resnet18", 3, image_size=(32, 32))
    weights = network.state_dict()
    for key in ("layer1.0.se.fc.weight", "layer1.0.conv_mean.mean"):
        path = save(tmp_path / "w.pt", {**weights, key: torch.zeros(3)})
        with pytest.raises(ValueError, match=f"{key} unknown"):
            load_weights(network, head_of(network), path)
    for key in ("mean", "classifier.mean", "network.fc.extra", "fc.extra", "model.mean_image"):
        path = save(tmp_path / "w.pt", {**weights, key: torch.zeros(3)})
        assert load_weights(network, head_of(network), path).skipped == (key,)


class HalfFirst(BaseHTTPRequestHandler):
    """Send half of a file to the first request, the whole file to later requests."""

    content, asked = b"", 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content if kind.asked > 1 else self.content[: len(self.content) // 2])

    def log_message(self, *_: object) -> None:
        pass


def test_an_incomplete_download_is_deleted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = build("lenet5", 3, image_size=SIZE)
    HalfFirst.content = Path(save(tmp_path / "w.pt", source.state_dict())).read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), HalfFirst) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/w.pt"
        with pytest.raises(ValueError, match="cannot be"):
            build("lenet5", 3, image_size=SIZE, weights=url)
        assert same(build("lenet5", 3, image_size=SIZE, weights=url), source)
        with pytest.raises(ValueError, match="cannot be downloaded"):
            build("lenet5", 3, image_size=SIZE, weights=f"http://127.0.0.1:{server.server_port}/a b.pt")
        server.shutdown()
