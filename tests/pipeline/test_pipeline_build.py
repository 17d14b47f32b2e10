"""Every config key of the recipe has an effect: changing it changes the trained weights."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_data import COLORS, Run, make_image, write_image

from refract.models.bundle.bundle import load_bundle
from refract.models.training.freezing import blocks_of
from refract.pipeline.config import defaults
from refract.pipeline.config.config import Config, ConfigError, config_from_dict, load_config
from refract.pipeline.training.fit import Assembly, assemble, fit
from refract.pipeline.training.run import train

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

BASE = {
    "data": {"workers": 0, "batch_size": 16, "val_fraction": 0.2, "test_fraction": 0.1},
    "model": {"name": "cnn"},
    "optim": {"lr": 0.02, "warmup": 0},
    "trainer": {"max_epochs": 2, "precision": "fp32", "device": "cpu"},
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/NN.png of 24 × 24 pixels: 24, 16 and 8 images."""
    root = tmp_path_factory.mktemp("uneven")
    for label, count in zip(COLORS, (24, 16, 8), strict=True):
        for number in range(count):
            write_image(root / label / f"{number:02}.png", make_image(label, number)[:, :24])
    return root


def configured(folder: Path, overrides: Sequence[object]) -> Config:
    return config_from_dict(
        BASE | {"data": {**BASE["data"], "source": str(folder), "image_size": 24}}, list(map(str, overrides))
    )


def begun(folder: Path, *overrides: object) -> Assembly:
    return assemble(configured(folder, overrides))


def trained(folder: Path, tmp_path: Path, *overrides: object) -> tuple[torch.Tensor, int]:
    """Return (the kept weights, the number of epochs)."""
    assembly = begun(folder, *overrides)
    history = fit(assembly, tmp_path / "run", None)
    state = assembly.module.classifier.network.state_dict()
    return torch.cat([value.float().flatten() for value in state.values()]), len(history)


@pytest.fixture(scope="module")
def as_it_is(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., torch.Tensor]:
    """The weights of the reference training."""
    known: dict[tuple[object, ...], torch.Tensor] = {}

    def weights(*overrides: object) -> torch.Tensor:
        if overrides not in known:
            known[overrides], _ = trained(uneven, tmp_path_factory.mktemp("as_it_is"), *overrides)
        return known[overrides]

    return weights


MIX = ("--augment.policy", "[MixUp]")
AUGMIX = ("--augment.policy", "[AugMix]")
FOCAL = ("--loss.name", "focal")
SGD = ("--optim.name", "sgd")


@pytest.mark.parametrize(
    ("with_it", "without"),
    [
        (("--loss.label_smoothing", 0.2), ()),
        (("--loss.name", "mse"), ()),
        ((*FOCAL, "--loss.gamma", 0.5), FOCAL),
        (("--loss.class_weights", "balanced"), ()),
        (("--loss.penalty", 1e-2), ()),
        (("--loss.penalty", 1e-2, "--loss.l1_ratio", 1), ("--loss.penalty", 1e-2)),
        ((*AUGMIX, "--loss.consistency", 12), (*AUGMIX, "--loss.consistency", 1e-6)),
        (("--model.frozen_norms", "true"), ()),
        (("--optim.lr", 0.03), ()),
        (("--optim.head_lr", 2), ()),
        (("--optim.weight_decay", 0.5), ()),
        ((*SGD, "--optim.momentum", 0.5), SGD),
        ((*SGD, "--optim.nesterov", "false"), SGD),
        (("--optim.schedule", "linear"), ()),
        (("--optim.warmup", 0.5), ()),
        (("--optim.lr_end", 0.5), ()),
        (("--optim.norm_lr", 4), ()),
        (("--optim.layer_decay", 0.5), ()),
        (("--optim.sam", 0.1), ()),
        ((*SGD, "--optim.clip_norm", 1e-3), SGD),
        ((*SGD, "--optim.clip_value", 1e-5), SGD),
        (MIX, ()),
        (("--augment.policy", "[HorizontalFlip]"), ()),
        (("--data.sampler", "balanced"), ()),
        (("--data.repeats", 2), ()),
        (("--trainer.accumulate", 2), ()),
        (("--trainer.ema", 0.9), ()),
        (("--trainer.swa_start", 0.0), ()),
        (("--trainer.start_size", 0.5), ()),
    ],
    ids=lambda keys: " ".join(map(str, keys[-2:])) or "-",
)
def test_a_key_changes_the_training(
    with_it: tuple, without: tuple, uneven: Path, tmp_path: Path, as_it_is: Callable[..., torch.Tensor]
) -> None:
    one, _ = trained(uneven, tmp_path / "one", *with_it)
    other = as_it_is(*without)
    assert one.isfinite().all() and not torch.equal(one, other)


def test_equal_configs_train_equal_weights(uneven: Path, tmp_path: Path) -> None:
    one, other = (trained(uneven, tmp_path / name)[0] for name in ("one", "other"))
    assert torch.equal(one, other)


def test_gradient_checkpointing_keeps_the_weights(uneven: Path, tmp_path: Path) -> None:
    spared = begun(uneven, "--trainer.gradient_checkpointing", "true").module.classifier.network
    baseline = begun(uneven).module.classifier.network
    assert [sum("forward" in vars(m) for m in network.modules()) > 0 for network in (spared, baseline)] == [True, False]
    one, _ = trained(uneven, tmp_path / "one", "--trainer.gradient_checkpointing", "true")
    other, _ = trained(uneven, tmp_path / "other")
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_patience_stops_the_training(uneven: Path, tmp_path: Path) -> None:
    _, epochs = trained(uneven, tmp_path, "--trainer.patience", 1, "--trainer.max_epochs", 9, "--optim.lr", 1e-9)
    assert epochs == 2, "the second epoch is no better than the first"


@pytest.mark.parametrize(
    ("mode", "first"), [("feature-extract", 1), ("gradual", 1), ("linear-then-fine-tune", 1), ("fine-tune", None)]
)
def test_the_mode_selects_the_trained_parameters(mode: str, first: int | None, uneven: Path) -> None:
    assembly = begun(uneven, "--model.mode", mode, "--model.unfreeze_epochs", 2)
    assembly.module.train_blocks_of(0)
    blocks = blocks_of(assembly.module.classifier.network)
    trainable = [any(p.requires_grad for p in block) for block in blocks]
    assert trainable == [False] * (len(blocks) - first) + [True] if first else [True] * len(blocks)


def test_the_configured_initialisation_is_applied(uneven: Path) -> None:
    network = begun(uneven, "--model.init", "constant").module.classifier.network
    assert (network.head.weight == 0.1).all()
    images = torch.rand(64, 3, 24, 24)
    fast = begun(uneven, "--model.name", "fastnet", "--model.init", "lsuv").module.classifier.network
    baseline = begun(uneven, "--model.name", "fastnet").module.classifier.network
    assert torch.equal(fast.whiten.weight, baseline.whiten.weight), "what the network fixed itself stays"
    assert (
        not torch.equal(fast.stages[0].conv1.weight, baseline.stages[0].conv1.weight) and fast(images).isfinite().all()
    )


def test_training_starts_from_the_weights_of_a_file(uneven: Path, tmp_path: Path) -> None:
    for name, args in (("rbf", "{centres: 5}"), ("fastnet", "{}"), ("linear", "{features: visual_words, words: 4}")):
        asked = ("--model.name", name, "--model.args", args)
        before = begun(uneven, *asked).module.classifier.network
        changed = {key: value + 1 for key, value in before.state_dict().items()}
        torch.save(changed, tmp_path / f"{name}.pt")
        after = begun(uneven, *asked, "--model.weights", tmp_path / f"{name}.pt").module.classifier.network
        assert all(torch.equal(value, changed[key]) for key, value in after.state_dict().items()), name
    again = begun(uneven, *asked, "--model.weights", tmp_path / f"{name}.pt", "--model.init", "constant")
    state = again.module.classifier.network.state_dict()
    drawn_again = {key for key, value in state.items() if not torch.equal(value, changed[key])}
    head = {key for key in state if key.startswith("head.")}
    assert drawn_again == head and (again.module.classifier.network.head.weight == 0.1).all()
    with pytest.raises(ConfigError, match=r"model\.init: lsuv rescales every layer and would overwrite model\.weights"):
        configured(uneven, ("--model.weights", "x.pt", "--model.init", "lsuv"))


@pytest.mark.parametrize(
    ("asked", "lr", "head_lr"),
    [
        ({"model.name": "resnet20"}, defaults.CONVOLUTIONAL, 1.0),
        ({"model.name": "timm/resnet18.a1_in1k"}, defaults.CONVOLUTIONAL, 1.0),
        ({"model.name": "timm/vit_tiny_patch16_224"}, defaults.FROM_SCRATCH, 1.0),
        ({"model.name": "resnet20", "text.name": "hashing"}, defaults.FROM_SCRATCH, 1.0),
        ({"model.weights": "default"}, defaults.FINE_TUNE, 10.0),
        ({"model.weights": "default", "model.mode": "linear-then-fine-tune"}, defaults.UNFROZEN, 30.0),
        ({"model.weights": "default", "model.mode": "feature-extract"}, defaults.HEAD_ALONE, 1.0),
        ({"model.name": "none", "text.name": "hashing"}, defaults.FROM_SCRATCH, 1.0),
        ({"model.name": "none", "text.name": "encoder"}, defaults.FINE_TUNE, 10.0),
        ({"model.name": "resnet20", "optim.name": "sgd"}, 25 * defaults.FROM_SCRATCH, 1.0),
        ({"model.weights": "default", "optim.lr": 0.01}, 0.01, 10.0),
        ({"optim.lr": 0.7, "optim.head_lr": 0.2}, 0.7, 0.2),
    ],
)
def test_an_unset_learning_rate_depends_on_the_trained_parameters(asked: dict, lr: float, head_lr: float) -> None:
    config = defaults.filled(load_config(None, [f"--{key}={value}" for key, value in asked.items()]))
    assert (config.optim.lr, config.optim.head_lr) == (lr, head_lr)
    assert config.model.frozen_norms is (config.model.weights != "none")


def test_the_batch_norms_of_a_bundle_are_trained(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    config = defaults.filled(load_config(None, [f"--model.weights={tmp_path}"]))
    assert config.model.frozen_norms is False and config.optim.head_lr == 1.0


def test_data_memory_keeps_images_in_memory(uneven: Path) -> None:
    assert begun(uneven).data.in_memory and not begun(uneven, "--data.memory", "never").data.in_memory


def test_a_compiled_network_is_compiled(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for training, by Dynamo's fastest backend; the evaluation, which hooks into the layers, is not."""
    asked, compile_module = [], torch.nn.Module.compile

    def compile_fast(module: torch.nn.Module) -> None:
        asked.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_fast)
    runs = ("--trainer.runs_dir", tmp_path / "runs", "--trainer.compile", "true")
    done = train(configured(uneven, runs))
    assert asked == ["CNN"]
    assert done is not None and load_bundle(done.bundle).training_features() is not None


def test_a_teacher_and_test_time_augmentation_have_an_effect(uneven: Path, tmp_path: Path) -> None:
    runs = ("--trainer.runs_dir", tmp_path / "runs", "--trainer.tta", "flip")
    done = train(configured(uneven, (*runs, "--trainer.run_name", "teacher")))
    assert done is not None and {"accuracy", "tta_accuracy"} <= set(load_bundle(done.bundle).info.metrics)
    asked = ("--loss.teacher", done.bundle)
    plain, _ = trained(uneven, tmp_path / "a")
    taught, _ = trained(uneven, tmp_path / "b", *asked, "--loss.distill", 1)
    warmer, _ = trained(uneven, tmp_path / "c", *asked, "--loss.distill", 1, "--loss.temperature", 1)
    assert not torch.equal(plain, taught) and not torch.equal(taught, warmer)
    with pytest.raises(ConfigError, match=r"loss\.teacher: .* cannot train on 2 images of 16×16 pixels in some epochs"):
        lenet = train(configured(uneven, (*runs, "--trainer.run_name", "l", "--model.name", "lenet5")))
        begun(uneven, "--loss.teacher", lenet.bundle, "--trainer.start_size", 0.6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--model.args", "{head: mlp}"), "the argument 'head' is reserved"),
        (("--model.args", "{num_classes: 3}"), "the argument 'num_classes' is reserved"),
        (("--model.args", "{1: 2}"), "the argument 1 is not a text"),
        (("--model.name", "alexnet"), "model.name: alexnet cannot train on 2 images of 24×24 pixels"),
        (("--model.name", "mlp", "--model.args", "{norm: batch}", "--data.batch_size", 1), "batch_size of at least 2"),
        (("--model.name", "linear", "--model.args", "{features: hog, cell: 0}"), "cell=0: expected a whole number"),
        (("--model.name", "linear", "--model.args", "{features: visual_words, patch: 0}"), "patch=0: expected a whole"),
        (("--model.name", "linear", "--model.args", "{features: colour_histogram, bins: 0}"), "bins=0: expected a"),
        (("--model.name", "fastnet", "--model.args", "{logit_scale: a}"), "logit_scale='a': expected a number"),
        (("--model.name", "mlp", "--model.args", "{activation: sigmoid, pretrain: rbm}", "--model.init", "lsuv"), "would overwrite"),
        (("--model.name", "cnn", "--model.args", "{activation: elu, activation_args: {alpha: '0.1'}}"), "cnn cannot train on 2 images"),
        (("--model.name", "linear", "--model.args", "{features: pixels, cel: 4}"), "takes no arguments: remove cel"),
        (("--model.name", "cnn", "--model.args", "{residual: 'no', depth: 2}"), "residual='no': expected true or false"),
        (("--model.name", "cnn", "--model.args", "{widths: [2000000000000]}"), "model: [enforce fail at alloc_cpu"),
        (("--model.name", "timm/vit_tiny_patch16_224", "--model.args", "{global_pool: '', depth: 1}", "--data.image_size", 32),
         "expected one number for each of 3 labels"),
        (("--model.name", "timm/vit_tiny_patch16_224", "--model.args", "{dynamic_img_size: true, depth: 1}", "--data.image_size", 64,
          "--trainer.start_size", 0.5, "--trainer.max_epochs", 6), "of 40×40 pixels in some epochs"),
        (("--trainer.patience", 2, "--trainer.swa_start", 0.5), "may stop training before the averaging of trainer.swa_start"),
    ],
)  # fmt: skip
def test_incompatible_settings_are_rejected_before_training(asked: tuple, message: str, uneven: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        begun(uneven, *asked)


def test_non_finite_weights_are_reported(uneven: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the validation loss is nan after epoch 0.*lower learning rate"):
        trained(uneven, tmp_path, "--optim.lr", 1e30, "--data.batch_size", 40, "--trainer.max_epochs", 1)


def test_a_non_finite_loss_names_layer_and_batch_and_can_be_replayed(
    refract: Run, uneven: Path, tmp_path: Path
) -> None:
    lost = (
        "--optim.lr",
        1e4,
        "--optim.name",
        "sgd",
        "--model.name",
        "cnn",
        "--model.args",
        "{norm: none}",
        "--data.batch_size",
        4,
    )
    with pytest.raises(
        ConfigError, match=r"the training loss is nan in epoch 0, step \d, samples \[.*refract replay-batch"
    ) as caught:
        trained(uneven, tmp_path, *lost)
    assert "The weights are no longer finite" in str(caught.value) or "non-finite output is network." in str(
        caught.value
    )
    shown = refract("replay-batch", tmp_path / "run" / "bad-batch.pt").stdout
    assert "network.stages.0.0" in shown and "100.0%" in shown and ".png" in shown and '"version": 1' in shown
    (tmp_path / "other.pt").write_bytes(b"nothing")
    assert "is not a bad-batch.pt" in refract("replay-batch", tmp_path / "other.pt", code=2).stderr


def test_fastnet_trains_stably_on_grey_images(tmp_path: Path) -> None:
    for label in COLORS:
        for number in range(16):
            grey = make_image(label, number)[:, :24].mean(axis=2, keepdims=True).repeat(3, axis=2).astype("uint8")
            write_image(tmp_path / "grey" / label / f"{number:02}.png", grey)
    weights, epochs = trained(
        tmp_path / "grey", tmp_path, "--model.name", "fastnet", "--optim.name", "sgd", "--optim.lr", 0.1
    )
    assert epochs == 2 and weights.isfinite().all()


def test_a_network_with_3d_convolutions_trains(uneven: Path, tmp_path: Path) -> None:
    weights, epochs = trained(uneven, tmp_path, "--model.name", "cnn", "--model.args", "{conv: 3d, widths: [4, 8]}")
    assert weights.isfinite().all() and epochs > 0


def test_a_bundles_head_for_other_labels_starts_neutral(uneven: Path, tmp_path: Path) -> None:
    done = train(
        configured(uneven, ("--trainer.runs_dir", tmp_path, "--trainer.run_name", "a", "--trainer.max_epochs", 1))
    )
    assert done is not None
    state = begun(uneven, "--model.weights", done.bundle).module.classifier.state_dict()
    stored = load_file(done.bundle / "weights.safetensors")
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    others = tmp_path / "others"
    for number, folder in enumerate(sorted(path for path in uneven.iterdir() if path.is_dir())):
        shutil.copytree(folder, others / f"other {number}")
    fresh = begun(others, "--model.weights", done.bundle).module.classifier
    now = fresh.state_dict()
    differing = {key for key, value in stored.items() if not torch.equal(now[key], value)} - {"mean", "std"}
    assert differing == {"network.head.weight", "network.head.bias"}
    assert (now["network.head.weight"].diff(dim=0) == 0).all(), "every class has the same logit"
    (done.bundle / "bundle.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a bundle that can be verified: .*bundle\.json was altered"):
        begun(others, "--model.weights", done.bundle)


@pytest.mark.parametrize("kind", ["mean_image", "zca"])
def test_a_bundles_normalisation_is_reused(kind: str, uneven: Path, tmp_path: Path) -> None:
    options = ("--data.image_size", 24, "--data.normalize", kind)
    runs = ("--trainer.runs_dir", tmp_path, "--trainer.max_epochs", 1)
    base = train(configured(uneven, (*options, *runs, "--trainer.run_name", "base")))
    assert base is not None
    few = tmp_path / "few"
    for label in list(COLORS)[:2]:
        shutil.copytree(uneven / label, few / label)
    tuned = ("--data.image_size", 24, "--model.weights", base.bundle)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    wanted = load_bundle(base.bundle).classifier().normalise(pixels)
    assembly = begun(few, *tuned)
    assert assembly.module.classifier.normalize == kind
    torch.testing.assert_close(assembly.module.classifier.normalise(pixels), wanted)
    done = train(configured(few, (*tuned, *runs, "--trainer.run_name", "tuned")))
    assert done is not None
    torch.testing.assert_close(load_bundle(done.bundle).classifier().normalise(pixels), wanted)
    plain = begun(few, *tuned, "--data.mean", "[0.1, 0.2, 0.3]", "--data.std", "[0.4, 0.5, 0.6]")
    assert plain.module.classifier.normalize == "channel", "the config's own go first"
    with pytest.raises(ConfigError, match="mean_image"):
        begun(few, "--data.image_size", 16, "--model.weights", base.bundle)


def test_a_frozen_backbone_without_weights_is_logged(uneven: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(uneven, "--model.mode", "feature-extract")
    assert "with model.weights: none the backbone stays random" in caplog.text


def test_settings_without_effect_are_logged(uneven: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(
        uneven,
        "--loss.distill",
        0.9,
        "--loss.gamma",
        5,
        "--loss.l1_ratio",
        1,
        "--model.mode",
        "gradual",
        "--model.unfreeze_epochs",
        50,
    )
    for message in (
        "loss.distill has no effect",
        "loss.gamma has no effect",
        "loss.l1_ratio has no effect",
        "only the head is trained: model.unfreeze_epochs",
    ):
        assert message in caplog.text
    caplog.clear()
    begun(uneven)
    assert "no effect" not in caplog.text
