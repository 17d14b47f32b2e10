"""Record the losses of each step, and the gradients and activations once an epoch, while a training runs."""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from refract.models.classifier import Inputs, inputs_of
from refract.models.training.lightning_imports import Callback, lightning
from refract.models.training.lightning_module import ClassifierModule
from refract.models.training.objective import classification_loss
from refract.models.training.sharding import part_of_rank
from refract.pipeline.config.config import Config
from refract.pipeline.doctor.findings import early, late
from refract.pipeline.doctor.record import Record
from refract.pipeline.finding import Finding, cure, treatable

log = logging.getLogger(__name__)

OVERFIT_IMAGES, OVERFIT_STEPS, OVERFIT_SECONDS = 8, 60, 5.0
FLAT = 0.97
"""A sigmoid or tanh output is saturated beyond this fraction of the distance from the middle of its range to an end."""


Hook = Callable[[nn.Module, object, Tensor], None]


class Doctor(Callback):
    """A callback that fills a `Record`, logs early findings after the first step, and returns all findings at the end.

    Each step costs a few clock readings. Each epoch costs the gradient norms of one step and hooks on the activations of one batch.
    Losses stay on the device until the end of the epoch.
    """

    def __init__(self, record: Record, config: Config) -> None:
        """config: the run's; cures that it does not accept are dropped."""
        self.record, self.config, self.preflight_findings = record, config, list[Finding]()
        self.reported: set[str] = set()
        self._losses: list[Tensor] = []
        self._clock = time.perf_counter()
        self._hooks: list[RemovableHandle] = []

    def state_dict(self) -> dict[str, Any]:
        self._collect()
        return {**dataclasses.asdict(self.record), "reported": sorted(self.reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the record of a checkpoint. It may come from another version of Refract: unknown fields are dropped."""
        self.reported |= set(state_dict.get("reported", ()))
        names = {item.name for item in dataclasses.fields(Record)} & set(state_dict)
        values = {name: state_dict[name] for name in names}
        self.record = dataclasses.replace(self.record, **{**values, "ops": tuple(state_dict["ops"])})

    def findings(self, history: Sequence[Mapping[str, float]]) -> list[Finding]:
        """Return all findings, each name once, with cures that the config accepts. history: metrics of each epoch."""
        self._collect()
        self.record.history = list(history)
        first: dict[str, Finding] = {}
        for finding in [*self.preflight_findings, *early(self.record), *late(self.record)]:
            first.setdefault(finding.name, finding)
        return [treatable(finding, self.config) for finding in first.values()]

    def report(self, findings: Iterable[Finding]) -> None:
        """Log the findings that this training has not logged before."""
        for finding in findings:
            if finding.name not in self.reported:
                self.reported.add(finding.name)
                log.warning("doctor: %s", treatable(finding, self.config))

    def preflight(self, module: ClassifierModule, inputs: Inputs, targets: Tensor) -> None:
        """Measure the normalised images, and check that the network overfits OVERFIT_IMAGES samples. inputs: the classifier's."""
        self._look_at_inputs("val", module, inputs[0])
        few = tuple(None if values is None else values[:OVERFIT_IMAGES] for values in inputs)
        finding = overfit_finding(module, few, targets[:OVERFIT_IMAGES])
        if finding is not None:
            self.preflight_findings.append(finding)
            self.report([finding])

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._took("waiting")
        if batch_idx == 0:
            self._look_at_units(pl_module.classifier)
        if trainer.global_step == 0 and batch_idx == 0:
            self._look_at_inputs("train", pl_module, inputs_of(batch)[0])

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._took("forward")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._took("backward")

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        if len(self.record.gradients) > trainer.current_epoch:
            return
        earlier, ratios = self.record.gradients[:1], {}
        with torch.no_grad():
            for name, parameter in pl_module.classifier.named_parameters():
                if not parameter.requires_grad or parameter.ndim < 2 or parameter.grad is None:
                    continue
                # This callback is on rank 0 alone, so that it cannot collect the parts of the others.
                gradient, weight = part_of_rank(parameter.grad), part_of_rank(parameter)
                # A new head starts at zero weights, to which a ratio is meaningless.
                if name in earlier[0] if earlier else weight.any():
                    ratios[name] = float(gradient.norm() / weight.norm().clamp(min=1e-12))
        self.record.gradients.append(ratios)
        if trainer.global_step == 0:
            named = pl_module.classifier.named_parameters()
            self.record.unreached = [name for name, p in named if p.requires_grad and p.grad is None]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._took("optimiser")
        self._losses.append(outputs["loss"].detach())
        if trainer.global_step == 1 and len(self.record.losses) + len(self._losses) == trainer.accumulate_grad_batches:
            self._collect()
            self.report(early(self.record))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._collect()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock, so that a validation or a checkpoint does not count as waiting for images."""
        self._clock = time.perf_counter()

    def _took(self, part: str) -> None:
        now = time.perf_counter()
        self.record.seconds[part] = self.record.seconds.get(part, 0.0) + now - self._clock
        self._clock = now

    def _collect(self) -> None:
        if self._losses:
            self.record.losses += torch.stack(self._losses).float().cpu().tolist()
            self._losses = []

    def _look_at_inputs(self, split: str, module: Any, images: Tensor | None) -> None:
        if images is None:
            return
        with torch.no_grad():
            normalised = module.classifier.normalise(images[:64].to(module.device))
        self.record.inputs[split] = (float(normalised.mean()), float(normalised.std()))

    def _look_at_units(self, classifier: nn.Module) -> None:
        """Register hooks that measure the units in the next forward pass."""
        self.record.dead, self.record.saturated = {}, {}

        def watch(name: str, into: dict[str, float], fraction: Callable[[Tensor], Tensor]) -> Hook:
            def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
                if name not in into and output.ndim > 1:
                    into[name] = float(fraction(output.detach()))

            return hook

        for name, module in classifier.named_modules():
            if isinstance(module, nn.ReLU | nn.ReLU6):
                self._hooks.append(module.register_forward_hook(watch(name, self.record.dead, _dead)))
            elif isinstance(module, nn.Sigmoid | nn.Tanh):
                flat = _flat_sigmoid if isinstance(module, nn.Sigmoid) else _flat_tanh
                self._hooks.append(module.register_forward_hook(watch(name, self.record.saturated, flat)))


def overfit_finding(module: ClassifierModule, inputs: Inputs, targets: Tensor) -> Finding | None:
    """Return a finding if a copy of the network does not overfit the samples in OVERFIT_STEPS steps.

    Returns None too where the steps take longer than OVERFIT_SECONDS. Does not advance the shared random generators, and does not change
    the module.
    """
    started, losses = time.perf_counter(), list[float]()
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        classifier = copy.deepcopy(module.classifier).train()
        trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=3e-3)
        for _ in range(OVERFIT_STEPS):
            loss = classification_loss(classifier(*inputs), targets, task=module.task)
            losses.append(float(loss.detach()))
            if losses[-1] < 0.5 * losses[0] or time.perf_counter() - started > OVERFIT_SECONDS or loss.grad_fn is None:
                return None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if sum(losses[-10:]) / 10 < 0.8 * sum(losses[:3]) / 3:  # linear networks fall slowly
        return None
    return Finding(
        "one batch is not learned",
        f"in {OVERFIT_STEPS} steps on the same {len(targets)} images the loss moved only from {losses[0]:.3f} to {losses[-1]:.3f}",
        "check the labels, the frozen layers (model.mode) and dropout: a network that cannot overfit one batch learns no data set",
        (cure("model.mode", "fine-tune"),),
    )


def _dead(output: Tensor) -> Tensor:
    """Return the fraction of channels that are 0 for all images and positions."""
    units = output.transpose(0, 1).flatten(1) if output.ndim != 3 else output.flatten(0, 1).T
    return (units <= 0).all(dim=1).float().mean()


def _flat_sigmoid(output: Tensor) -> Tensor:
    return ((output - 0.5).abs() > FLAT / 2).float().mean()


def _flat_tanh(output: Tensor) -> Tensor:
    return (output.abs() > FLAT).float().mean()
