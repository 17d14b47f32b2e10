"""Freezing by epoch, heads, learning rates by depth, weight averaging."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from refract.models.classifier import Classifier
from refract.models.head import CosineHead, MLPHead, head_of, swap_head
from refract.models.registry import build
from refract.models.training.freezing import MODES, blocks_of, trained_blocks
from refract.models.training.lightning_imports import lightning
from refract.models.training.lightning_module import ClassifierModule
from refract.models.training.objective import distillation_loss
from refract.models.training.parameter_groups import parameter_groups
from refract.models.training.specs import LossSpec, OptimSpec
from refract.pipeline.training.callbacks.averaging import KEY, WeightAverage, best_weights
from tests.models.test_models_lightning_module import Images


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "perceptron", "resnet18", "timm/vit_tiny_patch16_224"])
def test_every_parameter_is_in_one_block_and_the_heads_are_the_last(name: str) -> None:
    network = build(name, 3, image_size=(32, 32))
    blocks = blocks_of(network)
    assert sorted(id(p) for block in blocks for p in block) == sorted(id(p) for p in network.parameters())
    assert {id(p) for p in blocks[-1]} == {id(p) for p in head_of(network).parameters()}


def test_modes_by_epoch() -> None:
    def course(mode: str) -> list[int]:
        return [trained_blocks(mode, epoch, 4, 9) for epoch in range(6)]

    assert course("fine-tune") == [9] * 6
    assert course("feature-extract") == [1] * 6
    assert course("gradual") == [1, 3, 5, 7, 9, 9]
    assert course("linear-then-fine-tune") == [1, 1, 1, 1, 9, 9]
    with pytest.raises(ValueError, match="mode='thaw'"):
        trained_blocks("thaw", 0, 1, 2)


class Watch(lightning.Callback):
    """Record which parameters and statistics changed in each epoch."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.before = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        state = pl_module.state_dict()
        self.moved.append({key for key, value in state.items() if not torch.equal(value, self.before[key])})


def fit(module: ClassifierModule, *callbacks: lightning.Callback, epochs: int, **options: object) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, DataLoader(Images(), batch_size=8), DataLoader(Images(), batch_size=8))
    return trainer


def make_module(name: str = "resnet20", frozen_norms: bool = False, **options: object) -> ClassifierModule:
    torch.manual_seed(0)
    classifier = Classifier(build(name, 2, image_size=(16, 16)), mean=(0.5,) * 3, std=(0.25,) * 3)
    classifier.frozen_norms = frozen_norms
    return ClassifierModule(classifier, task="multiclass", num_classes=2, **{"optim": OptimSpec(lr=0.01), **options})


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_its_blocks(mode: str) -> None:
    watch, module = Watch(), make_module(mode=mode, unfreeze_epochs=2)
    fit(module, watch, epochs=3)
    names = {id(p): name for name, p in module.named_parameters()}
    blocks = [{names[id(p)] for p in block} for block in blocks_of(module.classifier.network)]
    for epoch, moved in enumerate(watch.moved):
        count = trained_blocks(mode, epoch, 2, len(blocks))
        assert moved & set(names.values()) == set().union(*blocks[-count:]), epoch
        # The statistics of frozen batch norms stay as well.
        statistics = {key.rpartition(".")[0] for key in moved if key.endswith("running_mean")}
        trained = {name.rpartition(".")[0] for name in set().union(*blocks[-count:])}
        assert statistics <= trained


@pytest.mark.parametrize(("mode", "head"), [("linear-then-fine-tune", 2), ("gradual", 1), ("fine-tune", 0)])
def test_the_epochs_of_the_head_alone_have_a_separate_schedule(mode: str, head: int) -> None:
    class Rates(lightning.Callback):
        def __init__(self) -> None:
            self.rates: list[list[float]] = [[] for _ in range(4)]

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.rates[trainer.current_epoch].append(trainer.optimizers[0].param_groups[0]["lr"])

    seen = Rates()
    fit(
        make_module(mode=mode, unfreeze_epochs=2, optim=OptimSpec(lr=0.01, schedule="linear", warmup=0.0)),
        seen,
        epochs=4,
    )
    starts = [rates[0] for rates in seen.rates]
    assert [epoch for epoch, rate in enumerate(starts) if rate == pytest.approx(0.01)] == sorted({0, head})


def test_frozen_norms_keep_their_statistics_while_all_else_learns() -> None:
    watch, module = Watch(), make_module(frozen_norms=True)
    fit(module, watch, epochs=1)
    assert not any("running" in key for key in watch.moved[0])
    assert "classifier.network.stem.0.weight" in watch.moved[0]


def test_a_run_resumed_while_unfreezing_ends_with_the_same_weights(tmp_path) -> None:
    options = {"mode": "gradual", "unfreeze_epochs": 3, "optim": OptimSpec(lr=0.01, schedule="constant", warmup=0)}
    whole = make_module(**options)
    fit(whole, epochs=4)
    first = fit(make_module(**options), epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module(**options)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
    )  # fmt: skip
    trainer.fit(
        resumed,
        DataLoader(Images(), batch_size=8),
        DataLoader(Images(), batch_size=8),
        ckpt_path=tmp_path / "half.ckpt",
    )
    for (key, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_learning_rates_fall_with_the_distance_from_the_head() -> None:
    network = build("lenet5", 3, image_size=(32, 32))
    groups = parameter_groups(network, OptimSpec(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    kernels = [group["lr"] for group in groups if group["weight_decay"]]
    biases = [group["lr"] for group in groups if not group["weight_decay"]]
    assert kernels == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert biases == kernels
    assert any(p is network.head.weight for p in groups[-2]["params"])


@pytest.mark.parametrize(("kind", "cls"), [("mlp", MLPHead), ("cosine", CosineHead)])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm/resnet10t"])
def test_swapped_heads_are_found_and_trained(kind: str, cls: type, name: str) -> None:
    network = build(name, 3, image_size=(32, 32), head=kind)
    assert isinstance(head_of(network), cls)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    classifier = Classifier(network, mean=(0.5,) * 3, std=(0.5,) * 3).train_blocks(1)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in head_of(network).parameters()}
    with pytest.raises(ValueError, match="ends in a Conv2d"):
        swap_head(build("squeezenet1_1", 3, image_size=(64, 64)), kind)


def test_the_cosine_head_depends_only_on_angles() -> None:
    head = CosineHead(4, 3)
    values = torch.randn(2, 4)
    torch.testing.assert_close(head(values), head(7 * values))
    assert head(head.weight.detach())[0, 0].item() == pytest.approx(10)


def test_an_average_is_measured_and_stored_and_training_continues(tmp_path) -> None:
    seen: list[torch.Tensor] = []

    class See(lightning.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
            seen.append(pl_module.classifier.network.head.weight.clone())

    weights: list[torch.Tensor] = []

    class Own(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            weights.append(pl_module.classifier.network.head.weight.detach().clone())

    module, average = make_module(), WeightAverage(decay=0.5)
    trainer = fit(module, average, See(), Own(), epochs=2)
    expected = weights[0].clone()
    for number, weight in enumerate(weights[1:], start=1):
        expected.lerp_(weight, 1 - min(0.5, (1 + number) / (10 + number)))
    torch.testing.assert_close(seen[-1], expected)
    assert torch.equal(module.classifier.network.head.weight, weights[-1])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(best_weights(checkpoint)["classifier.network.head.weight"], expected)
    assert torch.equal(checkpoint["state_dict"]["classifier.network.head.weight"], weights[-1])


def test_stochastic_weight_averaging_is_the_mean_of_the_last_epochs(tmp_path) -> None:
    module, average, ends = make_module(), WeightAverage(swa_start=0.5), []

    class End(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            ends.append(pl_module.classifier.network.head.weight.detach().clone())

    trainer = fit(module, average, End(), epochs=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]["weights"]["classifier.network.head.weight"]
    torch.testing.assert_close(stored, (ends[2] + ends[3]) / 2)


def test_sam_steps_with_the_gradient_from_the_top_of_the_neighbourhood() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = OptimSpec(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, sam=0.5).make(layer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer.weight.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 4.0
    # At w + 0.5 = 2.5 the gradient of w² is 5.
    assert layer.weight.item() == pytest.approx(2 - 0.1 * 5)


@pytest.mark.slow
def test_sam_trains_and_counts_each_batch_once() -> None:
    module = make_module(optim=OptimSpec(lr=0.01, sam=0.05))
    trainer = fit(module, epochs=6)
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.9
    assert trainer.global_step == 18


@pytest.mark.parametrize("spec", [{"clip_norm": 1e-3}, {"clip_value": 1e-5}])
def test_gradients_are_clipped(spec: dict[str, float]) -> None:
    step_gradients: list[torch.Tensor] = []

    class See(lightning.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad.flatten() for p in pl_module.classifier.parameters() if p.grad is not None]
            step_gradients.extend([torch.cat(gradients)] if gradients else [])

    fit(make_module(optim=OptimSpec(lr=1e-3, **spec)), See(), epochs=1)
    if "clip_norm" in spec:
        assert float(step_gradients[0].norm()) == pytest.approx(1e-3, rel=1e-3)
    else:
        assert float(step_gradients[0].abs().max()) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.slow
def test_a_teacher_is_distilled_and_is_not_in_the_checkpoint() -> None:
    teacher = make_module()
    fit(teacher, epochs=12)
    with torch.no_grad():
        teacher.classifier.network.head.weight.neg_()
        teacher.classifier.network.head.bias.neg_()  # it now says the opposite of what the labels say
    pupil = make_module(teacher=teacher.classifier, loss=LossSpec(distill=1.0, temperature=1.0))
    assert not any("teacher" in key for key in pupil.state_dict())
    fit(pupil, epochs=12)
    inputs = Images().images
    with torch.no_grad():
        said, learned = (module.classifier.eval()(inputs).argmax(1) for module in (teacher, pupil))
    assert float((said == learned).float().mean()) > 0.8 and float((learned == Images().labels).float().mean()) < 0.2


def test_a_teacher_of_another_size_sees_the_images_at_its_size() -> None:
    """lenet5 rejects other sizes than its own."""
    teacher = Classifier(build("lenet5", 2, image_size=(24, 24)), mean=(0.5,) * 3, std=(0.25,) * 3)
    spec = LossSpec(distill=1.0, temperature=2.0)
    pupil = make_module(teacher=teacher, teacher_size=(24, 24), loss=spec)
    images, logits = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), torch.randn(3, 2)
    enlarged = nn.functional.interpolate(images.float(), (24, 24), mode="bilinear", antialias=True)
    expected = distillation_loss(logits, teacher(enlarged), task="multiclass", temperature=2.0)
    assert torch.allclose(pupil._distilled(torch.zeros(()), logits, teacher, (images,)), expected)


def test_sam_counts_a_batch_once_in_the_statistics() -> None:
    module = make_module(optim=OptimSpec(lr=1e-3, sam=0.1))
    fit(module, epochs=1)
    counts = {int(v) for key, v in module.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {3}


def test_swa_renews_the_statistics_of_batch_norms() -> None:
    average = WeightAverage(swa_start=0.0)
    module = make_module(optim=OptimSpec(name="sgd", lr=0.3, schedule="constant", warmup=0.0))
    fit(module, average, epochs=3)
    state = {key: value.clone() for key, value in average._average.items()}
    module.load_state_dict(state, strict=False)
    classifier = module.classifier.train()
    norm = next(m for m in classifier.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].mean(dim=(0, 2, 3))))
    with torch.no_grad():
        classifier(Images().images)
    key = next(key for key in state if key.endswith("running_mean"))
    torch.testing.assert_close(state[key], seen[0], atol=1e-3, rtol=1e-3)


def test_the_last_step_of_an_epoch_takes_the_mean_of_the_batches_that_it_has() -> None:
    step_gradients: list[torch.Tensor] = []

    class See(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            step_gradients.append(pl_module.classifier.network.head.bias.grad.clone())

    def gradients(accumulate: int) -> list[torch.Tensor]:
        step_gradients.clear()
        fit(make_module(optim=OptimSpec(name="sgd", lr=1e-12)), See(), epochs=1, accumulate_grad_batches=accumulate)
        return list(step_gradients)

    single, double = gradients(1), gradients(2)
    assert len(single) == 3 and len(double) == 2
    torch.testing.assert_close(double[0], (single[0] + single[1]) / 2, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(double[1], single[2], rtol=1e-3, atol=1e-5)


def test_two_runs_with_one_seed_end_alike() -> None:
    one, other = (make_module() for _ in range(2))
    for module in (one, other):
        fit(module, epochs=2)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_a_norm_goes_with_its_layer_and_thirds_are_thirds() -> None:
    network = build("cnn", 2, image_size=(16, 16), widths=[8, 16])
    names = {id(p): name for name, p in network.named_parameters()}
    blocks = [[names[id(p)].rpartition(".")[0] for p in block] for block in blocks_of(network)]
    assert len(blocks) == 3 and all(len(set(block)) == 2 for block in blocks[:-1]), blocks
    assert [trained_blocks("gradual", epoch, 11, 56) for epoch in (0, 3, 10, 11)] == [1, 16, 51, 56]
