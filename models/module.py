"""The training of a classifier as Lightning sees it: one step, its metrics, its optimiser.

Knows nothing of data sets, of trackers or of augmentation: `mix` comes from outside.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelF1Score

from models.classifier import Classifier, check_task, probabilities
from models.losses import check_targets, classification_loss, consistency_loss, soft_targets
from models.optim import check_optimizer, check_schedule, make_optimizer, warmup_schedule

Mix = Callable[..., tuple[Tensor, Tensor]]

# On a GPU, looking at a loss waits for the device. Losses are kept there and looked at together, every 50 steps and at
# the end of an epoch; on the CPU, where looking is free, at every step.
CHECK_EVERY = 50


class ClassifierModule(lightning.LightningModule):
    """A `Classifier` in training.

    Batches are dicts: `images` uint8 (B, 3, H, W), `targets` int64 (B,) or float32 (B, num_classes) for multilabel,
    `indices` int64 (B,), the samples' places in the data set. mix(images, targets, *, epoch, indices) → (images,
    targets) on the device, targets soft (B, num_classes), in training only. warmup: fraction of all steps.
    consistency: above 0, training images are (B, 3, 3, H, W), three views of each picture; the loss is then that of the
    first views plus this many times `consistency_loss`.
    class_weights: (num_classes,) for the training loss.

    Logs `lr`, `train_loss`, `train_accuracy`, `val_loss` and `monitor` once an epoch. Training figures are of the
    mixed, smoothed batches as they were trained on, counted with the step's own logits. `val_loss` is plain.
    ValueError for an unknown task, optimiser or schedule, or a target out of range; FloatingPointError when a training
    loss is not finite, at most CHECK_EVERY steps late, naming the step it happened in.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        task: str,
        num_classes: int,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        schedule: str = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        mix: Mix | None = None,
        channels_last: bool = False,
        class_weights: Tensor | None = None,
        consistency: float = 0.0,
    ) -> None:
        super().__init__()
        check_task(task)
        check_optimizer(optimizer)
        check_schedule(schedule, warmup)
        self.classifier = classifier.to(memory_format=torch.channels_last) if channels_last else classifier
        self.task, self.num_classes, self.mix, self.channels_last = task, num_classes, mix, channels_last
        self.label_smoothing, self.warmup, self.schedule = label_smoothing, warmup, schedule
        self.consistency = consistency
        self.make_optimizer = partial(
            make_optimizer, optimizer, classifier, lr=lr, weight_decay=weight_decay, momentum=momentum
        )
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.train_loss, self.train_accuracy, self.val_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_score: Metric = (
            MultilabelF1Score(num_classes, average="macro", validate_args=False)
            if task == "multilabel"
            else MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        )
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # step, loss, indices: not looked at yet
        self._totals: tuple[Tensor, Tensor, int] | None = None  # of the epoch: loss, right answers, samples

    @property
    def monitor(self) -> str:
        """The validation figure to maximise."""
        return "val_f1" if self.task == "multilabel" else "val_accuracy"

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), 0…255 → logits (B, num_classes)."""
        return self.classifier(images)

    def on_before_batch_transfer(self, batch: Mapping[str, Tensor], dataloader_idx: int) -> Mapping[str, Tensor]:
        """Check the targets while they are on the CPU, where the check does not stop the device."""
        check_targets(batch["targets"], self.num_classes, self.task)
        return batch

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's loss. Reads nothing back from the device, but for the look at the losses."""
        images, indices = self._images(batch), batch["indices"]
        targets = soft_targets(batch["targets"], self.num_classes, self.task)
        if self.mix is not None:
            images, targets = self.mix(images, targets, epoch=self.current_epoch, indices=indices)
        if self.consistency:
            views = self.classifier(images.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, len(targets)))
            logits = views[0]
        else:
            views, logits = None, self.classifier(images)
        loss = classification_loss(
            logits,
            targets,
            task=self.task,
            label_smoothing=self.label_smoothing,
            class_weights=self.class_weights,  # type: ignore[arg-type]
        )
        if views is not None:
            loss = loss + self.consistency * consistency_loss(views, task=self.task)
        self._count(loss.detach(), logits.detach(), targets)
        self._pending.append((self.global_step, loss.detach(), indices))
        if len(self._pending) >= (1 if loss.device.type == "cpu" else CHECK_EVERY):
            self._check_losses()
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Count the batch into `val_loss` and the monitored figure."""
        logits = self.classifier(self._images(batch))
        loss = classification_loss(logits, batch["targets"], task=self.task)
        self.val_loss.update(loss, weight=len(logits))
        guesses = probabilities(logits, task=self.task) if self.task == "multilabel" else logits.argmax(dim=1)
        self.val_score.update(guesses, batch["targets"].long())

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Logits (B, num_classes)."""
        return self.classifier(self._images(batch))

    def on_train_epoch_start(self) -> None:
        """Log the learning rate that the epoch begins with."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log at the epoch's last batch already: `on_train_epoch_end` of this module comes after that of callbacks."""
        if self.trainer.is_last_batch:
            self._log_epoch()

    def on_train_epoch_end(self) -> None:
        """Log what a run that stops in the middle of an epoch has left."""
        self._log_epoch()

    def on_validation_epoch_start(self) -> None:
        """Look at the training's losses before a checkpoint can be chosen."""
        self._check_losses()

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and the monitored figure."""
        self.log("val_loss", self.val_loss)
        self.log(self.monitor, self.val_score, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, and its schedule by step. ValueError if the trainer has no last step."""
        optimizer = self.make_optimizer()
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                f"schedule={self.schedule!r} needs the number of steps: give the trainer max_epochs or max_steps"
            )
        factor = partial(_factor, name=self.schedule, total_steps=max(1, int(total)), warmup=self.warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _images(self, batch: Mapping[str, Tensor]) -> Tensor:
        images = batch["images"]
        channels_last = self.channels_last and images.ndim == 4
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images

    def _count(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add the batch to the epoch's totals, on the device. Right: the dominant label, or each label's decision."""
        if self.task == "multilabel":
            right = ((logits > 0) == (targets > 0.5)).float().mean(dim=1).sum()
        else:
            right = (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        size = len(logits)
        if self._totals is None:
            self._totals = loss * size, right, size
        else:
            losses, rights, sizes = self._totals
            self._totals = losses + loss * size, rights + right, sizes + size

    def _log_epoch(self) -> None:
        self._check_losses()
        if self._totals is not None:
            losses, rights, size = self._totals
            # A metric each, filled once an epoch: torchmetrics then averages over processes, and a step costs nothing.
            for name, metric, total in (
                ("train_loss", self.train_loss, losses),
                ("train_accuracy", self.train_accuracy, rights),
            ):
                metric.update(total / size, weight=size)
                self.log(name, metric, on_step=False, on_epoch=True)
            self._totals = None

    def _check_losses(self) -> None:
        """FloatingPointError for the first pending loss that is not finite."""
        pending, self._pending = self._pending, []
        if not pending or bool(torch.stack([loss for _, loss, _ in pending]).isfinite().all()):
            return
        step, loss, indices = next(entry for entry in pending if not entry[1].isfinite())
        raise FloatingPointError(
            f"the training loss is {float(loss)} in epoch {self.current_epoch}, step {step}, "
            f"samples {indices[:8].tolist()}…: try a lower lr or a longer warmup, or look at these samples"
        )


def _factor(step: int, *, name: str, total_steps: int, warmup: float) -> float:
    return warmup_schedule(name, step, total_steps, warmup)
