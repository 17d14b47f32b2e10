"""The training module under a real Trainer, on a few random images labelled by their brightness."""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.models.training import lightning_imports
from refract.models.training.lightning_imports import lightning
from refract.models.training.lightning_module import ClassifierModule, MeanAveragePrecision
from refract.models.training.specs import OptimSpec


class Images(Dataset):
    """`count` images of 16×16; class c is as bright as c."""

    def __init__(self, count: int = 24, *, classes: int = 2, multilabel: bool = False) -> None:
        noise = torch.randint(0, 60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(count) % classes
        self.images = (noise + 180 * self.labels.view(-1, 1, 1, 1) // max(1, classes - 1)).to(torch.uint8)
        self.multilabel = multilabel

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        bright = self.labels[index]
        targets = torch.stack([bright, 1 - bright]).float() if self.multilabel else bright
        return {"images": self.images[index], "targets": targets, "indices": index}


def make_module(task: str = "multiclass", **options: Any) -> ClassifierModule:
    torch.manual_seed(0)
    classifier = Classifier(build("resnet20", 2, image_size=(16, 16)), mean=(0.5,) * 3, std=(0.25,) * 3)
    optim_options = {name: options.pop(name) for name in list(options) if name in OptimSpec.__dataclass_fields__}
    optim = OptimSpec(**{"lr": 0.01, **optim_options})
    return ClassifierModule(classifier, task=task, num_classes=2, optim=optim, **options)


class History(lightning.Callback):
    """Record the metrics that callbacks see at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def fit(module: ClassifierModule, *, epochs: int = 6, images: Images | None = None, **options: Any) -> History:
    images, history = images or Images(), History()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[history],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(images, batch_size=8, shuffle=True), DataLoader(images, batch_size=8))
    return history


@pytest.mark.parametrize(("task", "optimizer"), [("binary", "sgd"), ("multiclass", "adamw"), ("multilabel", "adamw")])
def test_it_learns_and_logs_metrics_for_callbacks(task: str, optimizer: str) -> None:
    module = make_module(task, name=optimizer)
    history = fit(module, images=Images(multilabel=task == "multilabel"))
    first, last = history.epochs[0], history.epochs[-1]
    assert module.monitor == ("val_map" if task == "multilabel" else "val_accuracy")
    assert set(last) == {"lr", "train_loss", "train_accuracy", "val_loss", module.monitor}
    assert last["train_loss"] < 0.6 * first["train_loss"]
    assert last["train_accuracy"] > 0.9
    assert last[module.monitor] > 0.9


def test_logged_metrics_cover_the_whole_epoch() -> None:
    """With a learning rate near 0 every step uses the same network, so that the epoch's mean is known."""
    module = make_module(lr=1e-12, weight_decay=0.0, schedule="constant", warmup=0.0)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    images = Images(20)  # batches of 8, 8 and 4
    epoch = fit(module, epochs=1, images=images).epochs[0]
    with torch.no_grad():
        logits = module.classifier(images.images)
    loss = float(torch.nn.functional.cross_entropy(logits, images.labels))
    accuracy = float((logits.argmax(1) == images.labels).float().mean())
    assert epoch["train_loss"] == pytest.approx(loss, rel=1e-4)
    assert epoch["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert epoch["train_accuracy"] == pytest.approx(accuracy)
    assert epoch["val_accuracy"] == pytest.approx(accuracy)


def test_the_learning_rate_warms_up_and_falls_by_step() -> None:
    history = fit(make_module(lr=0.1, warmup=0.5, name="sgd"), epochs=4)  # 12 steps, 6 of them warm-up
    assert history.rates[:6] == pytest.approx([0.1 * (step + 1) / 6 for step in range(6)])
    assert history.rates[6] == pytest.approx(0.1)
    assert history.rates[9] == pytest.approx(0.05)
    assert [epoch["lr"] for epoch in history.epochs] == pytest.approx(history.rates[::3])


class Recorder:
    """A mix that swaps the batch's labels and records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int], tuple[int, ...], torch.dtype]] = []

    def __call__(
        self, images: Tensor, targets: Tensor, *, epoch: int, indices: Tensor, repeats: None
    ) -> tuple[Tensor, Tensor]:
        self.calls.append((epoch, indices.tolist(), tuple(targets.shape), targets.dtype))
        return images, targets.flip(1)


def test_mix_is_called_in_training_with_epoch_and_indices_and_its_targets_are_learnt() -> None:
    mix = Recorder()
    history = fit(make_module(mix=mix), epochs=6)
    assert [call[0] for call in mix.calls] == [epoch for epoch in range(6) for _ in range(3)]
    for epoch in range(6):
        seen = [index for call in mix.calls if call[0] == epoch for index in call[1]]
        assert sorted(seen) == list(range(24))
    assert {call[2:] for call in mix.calls} == {((8, 2), torch.float32)}
    # The labels were swapped in training: what it learnt is wrong on the untouched validation images.
    assert history.epochs[-1]["train_accuracy"] > 0.9
    assert history.epochs[-1]["val_accuracy"] < 0.1


def test_class_weights_reach_the_training_loss() -> None:
    history = fit(make_module(class_weights=torch.tensor([1.0, 0.0])), epochs=4)
    # Nothing speaks for class 1 any more.
    assert history.epochs[-1]["val_accuracy"] == 0.5


def test_channels_last_reaches_the_network() -> None:
    seen: list[bool] = []
    module = make_module(channels_last=True)
    stem = module.classifier.network.stem[0]
    stem.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    fit(module, epochs=1)
    assert seen and all(seen)
    assert stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_frozen_backbone_stays_frozen_through_training_and_validation() -> None:
    module = make_module(mode="feature-extract")
    before = {key: tensor.clone() for key, tensor in module.classifier.state_dict().items()}
    fit(module, epochs=2)
    moved = {key for key, tensor in module.classifier.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == {"network.head.weight", "network.head.bias"}


class Poison:
    """A mix that makes the loss of one step non-finite."""

    def __init__(self, step: int) -> None:
        self.left, self.indices = step, []

    def __call__(
        self, images: Tensor, targets: Tensor, *, epoch: int, indices: Tensor, repeats: None
    ) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == -1:
            self.indices = indices.tolist()
            return images, targets * float("nan")
        return images, targets


def test_a_loss_that_is_not_finite_stops_and_names_epoch_step_and_samples() -> None:
    poison = Poison(4)  # three steps an epoch: the second step of epoch 1
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 1, step 4, samples") as caught:
        fit(make_module(mix=poison), epochs=3)
    assert str(poison.indices) in str(caught.value)
    assert poison.left == -1, "on a CPU no further step runs"


def test_a_class_index_out_of_range_stops() -> None:
    images = Images()
    images.labels[5] = 7
    with pytest.raises(ValueError, match="class index 7: expected 0…1"):
        fit(make_module(), epochs=1, images=images)


def test_targets_are_checked_before_they_reach_the_device() -> None:
    """On a GPU the step itself does not check: it would wait for the device."""
    batch = {"targets": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match="class index 2: expected 0…1"):
        make_module().on_before_batch_transfer(batch, 0)


def test_metrics_of_an_interrupted_epoch_are_logged() -> None:
    module = make_module()
    fit(module, epochs=-1, max_steps=2)
    assert {"train_loss", "train_accuracy"} <= set(module.trainer.callback_metrics)


def test_predict_gives_logits() -> None:
    module, images = make_module().eval(), Images(4)
    batch = {"images": images.images, "targets": images.labels, "indices": torch.arange(4)}
    assert torch.equal(module.predict_step(batch, 0), module.classifier(images.images))


def test_bad_options_are_named_at_construction() -> None:
    with pytest.raises(ValueError, match="task='multi'"):
        make_module("multi")
    with pytest.raises(ValueError, match="mode='thaw'"):
        make_module(mode="thaw")


def test_a_schedule_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="set the trainer's max_epochs or max_steps"):
        fit(make_module(), epochs=-1)


def test_mean_average_precision_skips_labels_without_positives() -> None:
    metric = MeanAveragePrecision(3)
    probabilities = torch.tensor([[0.9, 0.1, 0.5], [0.6, 0.8, 0.5], [0.3, 0.7, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(probabilities, torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]]))
        assert metric.compute().item() == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
        nothing = MeanAveragePrecision(3)
        nothing.update(probabilities, torch.zeros(3, 3, dtype=torch.int64))
        assert nothing.compute().item() == 0


def test_a_torchmetrics_of_another_structure_is_left_to_an_ordinary_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(lightning_imports, "_PACKAGES", ("torchmetrics", "torchmetrics.not_in_this_version"))
    monkeypatch.setattr(lightning_imports, "_waiting", waiting := set())
    lightning_imports.defer_torchmetrics()
    assert not waiting and not any(name.partition(".")[0] == "torchmetrics" for name in sys.modules)
