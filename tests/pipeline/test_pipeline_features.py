"""The feature store: no image is embedded twice, and nothing in it is stale."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_data import make_image, write_image
from warm_process import WarmProcess

from refract import cli
from refract.augment import Augmenter, Preprocess
from refract.models.classifier import Classifier
from refract.models.head import head_of
from refract.models.registry import build
from refract.pipeline.features import embed as embedding
from refract.pipeline.features import model as embedding_models
from refract.pipeline.features.embed import Options, embed
from refract.pipeline.features.model import EmbeddingModel, model_key, network_values, open_model
from refract.pipeline.features.source import samples_of
from refract.pipeline.features.store import FeatureStore, Key, View, stored_models
from refract.pipeline.stopping import Stop, Stopped

Embed = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(build("resnet20", 3, image_size=(32, 32)).state_dict(), path)
    return path


@pytest.fixture
def run(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> Embed:
    """Run `refract embed` on the folder, and return its JSON."""

    def start(*options: object, data: object = folder, model: object = "resnet20", code: int = 0) -> dict[str, Any]:
        named = [] if Path(str(model)).exists() else ["--weights", weights, "--image-size", 32]
        given = ["embed", data, "--model", model, *named, "-o", "features", "--json", *options]
        assert cli.main([*map(str, given)]) == code
        printed = capsys.readouterr().out
        result: dict[str, Any] = json.loads(printed) if printed else {}
        return result

    return start


def test_a_second_command_embeds_nothing_again(run: Embed) -> None:
    assert run()["computed"] == 60
    again = run()
    assert (again["computed"], again["reused"], again["stored"]) == (0, 60, 60)


def test_a_changed_image_is_embedded_again_and_a_moved_or_relabelled_one_is_not(run: Embed, folder: Path) -> None:
    run()
    classes = sorted(path.name for path in folder.iterdir())
    write_image(folder / classes[0] / "00.jpg", make_image(classes[1], 777))
    (folder / classes[0] / "01.jpg").rename(folder / classes[1] / "moved.jpg")
    (folder / classes[0] / "02.jpg").unlink()
    result = run()
    assert (result["computed"], result["reused"], result["stored"]) == (1, 58, 59)
    key, record = next(stored_models(Path("features")))
    stored = {Path(sample.path).name: sample for sample in FeatureStore(Path("features"), key, record).samples()}
    assert len(FeatureStore(Path("features"), key, record).samples()) == 59
    assert stored["moved.jpg"].labels == (classes[1],)


def test_other_weights_or_another_size_embed_everything_again(run: Embed, weights: Path) -> None:
    run()
    assert run("--image-size", 28)["computed"] == 60
    other = build("resnet20", 3, image_size=(32, 32)).state_dict()
    save_file(other, weights.with_name("other.safetensors"))
    assert run("--weights", weights.with_name("other.safetensors"))["computed"] == 60
    assert len(list(stored_models(Path("features")))) == 3
    assert run()["computed"] == 0


def test_the_head_plays_no_part_in_the_key(weights: Path) -> None:
    state = build("resnet20", 3, image_size=(32, 32)).state_dict()
    head = list(state)[-2:]
    changed = {name: torch.ones_like(value) if name in head else value for name, value in state.items()}
    files = [weights.with_name(name) for name in ("plain.safetensors", "headless.safetensors")]
    for file, values in zip(files, (state, changed), strict=True):
        save_file(values, file)
    keys = {open_model("resnet20", str(file), 32).key for file in files}
    assert len(keys) == 1


def test_a_stopped_command_keeps_its_finished_shards(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "SHARD_SIZE", 16)
    model = open_model("resnet20", str(weights), 32)
    samples, labels = samples_of(str(folder))

    def work(received: int | None) -> int:
        stop = Stop("now")
        stop.signal = received
        store = FeatureStore(Path("features"), model.key, model.record)
        return embed(model, samples, labels, store, "data", Options(jobs=1), stop).computed

    with pytest.raises(Stopped):
        work(signal.SIGTERM)
    assert work(None) == 60 - 16


@pytest.mark.slow
def test_a_killed_command_repeats_at_most_one_shard(
    run: Embed, weights: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    options = ["--model", "resnet20", "--weights", str(weights), "--image-size", "16", "--jobs", "1", "-o", "features"]
    process = warm.start(["embed", "digits", *options], cwd=tmp_path, env=dict(os.environ))
    with process.output:
        until = time.monotonic() + 120
        while not list((tmp_path / "features").glob("*/vectors-*.parquet")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    process.wait(30)
    written = 512 * len(list((tmp_path / "features").glob("*/vectors-*.parquet")))
    result = run("--image-size", 16, "--jobs", 1, data="digits")
    assert (result["stored"], result["reused"]) == (1797, min(written, 1797))


def test_the_stored_embeddings_are_the_inputs_of_the_head(run: Embed, folder: Path, weights: Path) -> None:
    run()
    model = open_model("resnet20", str(weights), 32)
    sample = samples_of(str(folder))[0][7]
    network = model.classifier.network
    image = torch.from_numpy(model.preprocess(sample.read())).permute(2, 0, 1)[None]
    inputs: list[torch.Tensor] = []
    head_of(network).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model.classifier(image)
    store = FeatureStore(Path("features"), model.key, model.record)
    store.refresh()
    content = next(row.content for row in store.samples() if row.path == sample.path)
    np.testing.assert_allclose(store.vectors([Key(content)])[0], inputs[0][0], rtol=2e-3, atol=1e-4)


def test_augmented_views_are_further_rows(run: Embed, folder: Path, weights: Path) -> None:
    assert run("--policy", "cifar", "--epochs", 2)["computed"] == 180
    assert run("--policy", "cifar", "--epochs", 3, "--seed", 0)["computed"] == 60
    assert run("--policy", "cifar", "--seed", 1)["computed"] == 60
    model = open_model("resnet20", str(weights), 32)
    sample = samples_of(str(folder))[0][5]
    augmenter = Augmenter("cifar", 0, size=(32, 32), color_profile=model.preprocess.color_profile)
    store = FeatureStore(Path("features"), model.key, model.record)
    store.refresh()
    content = next(row.content for row in store.samples() if row.path == sample.path)
    stored = store.vectors([Key(content, View(embedding.policy_digest(augmenter), 1, 5))])[0]
    view = augmenter(sample.read(), epoch=1, index=5)
    np.testing.assert_allclose(stored, _embedding_of(model, view), rtol=5e-3, atol=1e-3)


def _embedding_of(model: EmbeddingModel, image: np.ndarray) -> np.ndarray:
    from refract.models.head import head_inputs

    with torch.no_grad(), head_inputs(model.classifier.network) as vectors:
        model.classifier(torch.from_numpy(image).permute(2, 0, 1)[None])
    return vectors[0].numpy()[0]


def test_an_unreadable_image_is_reported_and_the_others_are_embedded(
    run: Embed, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(folder.rglob("*.jpg"))
    first.write_bytes(b"not an image")
    result = run()
    assert result["computed"] == 59
    assert list(result["failed"]) == [str(first)]


def test_views_of_an_unreadable_image_shift_no_other_embedding(run: Embed, folder: Path, weights: Path) -> None:
    first = min(folder.rglob("*.jpg"))
    first.write_bytes(b"not an image")
    result = run("--policy", "cifar", "--epochs", 2)
    assert (result["computed"], result["stored"]) == (3 * 59, 59)
    assert list(result["failed"]) == [str(first)]
    model = open_model("resnet20", str(weights), 32)
    store = FeatureStore(Path("features"), model.key, model.record)
    store.refresh()
    for sample in (store.samples()[0], store.samples()[-1]):
        expected = _embedding_of(model, model.preprocess(Path(sample.path).read_bytes()))
        np.testing.assert_allclose(store.vectors([Key(sample.content)])[0], expected, rtol=5e-3, atol=1e-3)


def test_an_embedding_beyond_float16_is_reported(run: Embed, tmp_path: Path) -> None:
    state = build("resnet20", 3, image_size=(32, 32)).state_dict()
    state["stages.8.bn2.bias"] += 1e6
    save_file(state, tmp_path / "large.safetensors")
    result = run("--weights", tmp_path / "large.safetensors", code=1)
    assert result["stored"] == 0
    assert "exceed the range of float16" in next(iter(result["failed"].values()))


def test_a_file_that_changes_between_its_hash_and_its_embedding_is_not_stored(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model("resnet20", str(weights), 32)
    samples, labels = samples_of(str(folder))
    changed = Path(samples[3].path)
    hashed = embedding._contents

    def contents(*arguments: Any) -> Any:
        result = hashed(*arguments)
        write_image(changed, make_image("red", 4711))
        return result

    monkeypatch.setattr(embedding, "_contents", contents)
    store = FeatureStore(Path("features"), model.key, model.record)
    result = embed(model, samples, labels, store, "data", Options(jobs=1), Stop("now"))
    assert list(result.failed) == [str(changed)]
    assert "changed while it was embedded" in result.failed[str(changed)]
    assert (result.computed, result.keys[3]) == (59, None)


def test_a_sample_without_an_image_is_reported(run: Embed, folder: Path, tmp_path: Path) -> None:
    paths = sorted(folder.rglob("*.jpg"))[:40:10]
    rows = [f"{path},a text,{path.parent.name}" for path in paths] + [f",only a text,{paths[0].parent.name}"]
    (tmp_path / "texts.csv").write_text("\n".join(["path,text,label", *rows]))
    result = run(data=tmp_path / "texts.csv")
    assert (result["stored"], [*result["failed"].values()]) == (4, ["has no image, which the model reads"])


def test_a_file_name_that_is_not_utf8_is_shown_with_its_bytes(run: Embed, folder: Path) -> None:
    source = min(folder.rglob("*.jpg"))
    (source.parent / os.fsdecode(b"caf" + bytes([0xE9]) + b".jpg")).write_bytes(source.read_bytes())
    assert run()["stored"] == 61
    key, record = next(stored_models(Path("features")))
    assert any("caf\\xe9" in sample.path for sample in FeatureStore(Path("features"), key, record).samples())


def test_another_code_of_the_plugin_of_a_network_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(build("resnet20", 3, image_size=(32, 32)), mean=(0, 0, 0), std=(1, 1, 1))
    keys = []
    for digest in ("a", "b"):
        monkeypatch.setattr(embedding_models, "provider", lambda kind, name, d=digest: SimpleNamespace(sha256=d))
        keys.append(model_key(classifier, Preprocess(32, 32), {"name": "net", "args": {}}, None))
    assert keys[0] != keys[1]


def test_the_store_has_no_credentials_of_a_url_of_weights() -> None:
    values = network_values("resnet20", "https://user:secret@host/net.safetensors?token=hidden", (32, 32))
    assert "secret" not in str(values) and "hidden" not in str(values)


def test_a_folder_without_labels_is_embedded(run: Embed, tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "flat" / f"{number}.jpg", make_image("red", number))
    assert run(data=tmp_path / "flat")["computed"] == 3


def test_a_damaged_shard_is_named_with_the_remedy(run: Embed, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    shard = next(Path("features").rglob("vectors-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    image = str(next(folder.rglob("*.jpg")))
    assert cli.main(["search", "features", image]) == 2
    message = capsys.readouterr().err
    assert str(shard) in message and "delete it: its embeddings are then computed again" in message
    run(code=2)
    shard.unlink()
    assert run()["computed"] == 60


@pytest.mark.slow
def test_worker_processes_write_the_same_embeddings(run: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "SHARD_SIZE", 20)

    def vectors() -> np.ndarray:
        key, record = next(stored_models(Path("features")))
        store = FeatureStore(Path("features"), key, record)
        store.refresh()
        return store.vectors([Key(sample.content) for sample in sorted(store.samples(), key=lambda s: s.path)])

    assert run("--jobs", 2)["computed"] == 60
    parallel = vectors()
    for shard in Path("features").rglob("vectors-*.parquet"):
        shard.unlink()
    assert run("--jobs", 1)["computed"] == 60
    np.testing.assert_allclose(parallel, vectors(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "DATA", "--model", "resnet20"], "a network needs weights"),
        (["embed", "DATA", "--model", "lenet6"], "lenet6"),
        (["embed", "DATA", "--model", "."], "neither a bundle nor a run"),
        (["embed", "DATA", "--model", "models:/photos@champion"], "not accepted here; name a folder, such as"),
        (["embed", "nothing", "--model", "resnet20", "--weights", "WEIGHTS"], "nothing"),
        (["search", "nothing", "x.jpg"], "is not a feature store"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"DATA": str(folder), "WEIGHTS": str(weights)}.get(argument, argument) for argument in arguments]
    assert cli.main(given) == 2
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[-1]


def test_search_finds_the_image_itself_first_and_its_class_next(
    run: Embed, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    image = next(folder.rglob("*.jpg"))
    in_archive = f"{shutil.make_archive(str(tmp_path / 'photos'), 'zip', image.parent)}/{image.name}"
    assert cli.main(["search", "features", str(image), in_archive, "--top", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    neighbours = printed[str(image)]
    assert printed[in_archive] == neighbours
    assert neighbours[0]["path"] == str(image)
    assert neighbours[0]["similarity"] == pytest.approx(1, abs=1e-3)
    similarities = [row["similarity"] for row in neighbours]
    assert similarities == sorted(similarities, reverse=True)
    assert len(neighbours) == 4


def test_search_asks_for_the_model_of_a_store_of_several(
    run: Embed, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    run("--image-size", 28)
    image = str(next(folder.rglob("*.jpg")))
    assert cli.main(["search", "features", image]) == 2
    assert "choose one with --model" in capsys.readouterr().err
