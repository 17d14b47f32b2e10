"""The training of a classifier as Lightning sees it: one step, its metrics, its optimiser.

Knows nothing of data sets, of trackers or of augmentation: `mix` comes from outside.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from refract.models.classifier import Classifier, Inputs, check_task, inputs_of, probabilities
from refract.models.training.activation_checkpointing import statistics_kept
from refract.models.training.freezing import blocks_of, head_epochs, trained_blocks
from refract.models.training.losses import (
    LossSpec,
    check_targets,
    classification_loss,
    consistency_loss,
    distillation_loss,
    elastic_net,
    soft_targets,
)
from refract.models.training.optimizers import OptimSpec

Mix = Callable[..., tuple[Tensor, Tensor]]

# On a GPU, looking at a loss waits for the device. Losses are kept there and looked at together, every 50 steps and at
# the end of an epoch; on the CPU, where looking is free, at every step.
CHECK_EVERY = 50

COUNTED = "counted_of_the_epoch"
"""Where a checkpoint in the middle of an epoch holds what the module has counted of it."""


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean over the labels of their average precision: multi-label accuracy without a threshold.

    Labels without a positive sample do not count; 0 where no label has one.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average=None, validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics overrides it alike
        """A scalar in 0…1."""
        positive = dim_zero_cat(self.target).gt(0).any(dim=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples")
            values = super().compute()
        return values[positive].mean() if positive.any() else values.new_zeros(())


class ClassifierModule(lightning.LightningModule):
    """A `Classifier` in training.

    Batches are dicts: `images` uint8 (B, 3, H, W), `targets` int64 (B,) or float32 (B, num_classes) for multilabel,
    `indices` int64 (B,), the samples' places in the data set, and in training `repeats` int64 (B,), which of its draws in the epoch each is
    (none: the first); of classifiers that read texts also `texts` int32 (B, L) and `has_image` bool (B,), and no `images` where they read
    nothing else. mix(images, targets, *, epoch, indices, repeats) → (images, targets) on the device, targets soft (B, num_classes), in
    training only.
    loss.consistency: above 0, training images are (B, 3, 3, H, W), three views of each image; the loss is then that of the first views
    plus this many times `consistency_loss`. class_weights: (num_classes,) for the training loss. mode, unfreeze_epochs: which blocks are
    trained in which epoch, see `refract.models.training.freezing`. teacher: a classifier to learn from besides, with
    loss.distill, that reads no more than this one and makes the same tokens of texts. start_size: share of
    the images' sides that the first epoch sees, rising to all of them at three quarters of the epochs, in steps of 8 pixels (Howard 2018;
    Tan & Le 2021, arXiv:2104.00298, section 4).

    Logs `lr`, `train_loss`, `train_accuracy`, `val_loss` and `monitor` once an epoch. Training figures are of the mixed, smoothed batches
    as they were trained on, counted with the step's own logits, without penalty. `val_loss` is plain. ValueError for an unknown task or
    mode, or a target out of range; FloatingPointError when a training loss is not finite, at most CHECK_EVERY steps late, naming the step
    it happened in.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        task: str,
        num_classes: int,
        optim: OptimSpec | None = None,
        loss: LossSpec | None = None,
        mix: Mix | None = None,
        channels_last: bool = False,
        class_weights: Tensor | None = None,
        mode: str = "fine-tune",
        unfreeze_epochs: int = 1,
        teacher: Classifier | None = None,
        start_size: float = 1.0,
    ) -> None:
        super().__init__()
        check_task(task)
        trained_blocks(mode, 0, unfreeze_epochs, 1)
        self.classifier = classifier.to(memory_format=torch.channels_last) if channels_last else classifier
        self.task, self.num_classes, self.mix, self.channels_last = task, num_classes, mix, channels_last
        self.optim, self.loss = optim or OptimSpec(), loss or LossSpec()
        self.mode, self.unfreeze_epochs, self.start_size = mode, unfreeze_epochs, start_size
        # Not a submodule: the teacher is no part of the checkpoints.
        self._teacher = (None if teacher is None else teacher.eval().requires_grad_(False),)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.train_loss, self.train_accuracy, self.val_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_score: Metric = (
            MeanAveragePrecision(num_classes)
            if task == "multilabel"
            else MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        )
        self._epoch_lr = 0.0
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # step, loss, indices: not looked at yet
        self._totals: tuple[Tensor, Tensor, int] | None = None  # of the epoch: loss, right answers, samples

    @property
    def monitor(self) -> str:
        """The validation metric to maximise. For multi-label it needs no threshold, as thresholds are chosen after the training."""
        return "val_map" if self.task == "multilabel" else "val_accuracy"

    def forward(self, images: Tensor | None, *more: Tensor) -> Tensor:
        """As the classifier's."""
        return self.classifier(images, *more)

    def on_before_batch_transfer(self, batch: Mapping[str, Tensor], dataloader_idx: int) -> Mapping[str, Tensor]:
        """Check the targets while they are on the CPU, where the check does not stop the device."""
        check_targets(batch["targets"], self.num_classes, self.task)
        return batch

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's loss. Reads nothing back from the device, but for the look at the losses."""
        images, indices, mixed = self._images(batch), batch["indices"], None
        images = None if images is None else self._sized(images)
        targets = soft_targets(batch["targets"], self.num_classes, self.task)
        if self.mix is not None and images is not None:
            images, targets, mixed = self._mixed(images, targets, batch)
        if self.loss.consistency and images is not None:
            images = images.transpose(0, 1).flatten(0, 1)
        beside = (*inputs_of(batch)[1:], *(() if mixed is None else (mixed,)))
        second_pass = getattr(self.optimizers(use_pl_optimizer=False), "second_pass", False)
        with statistics_kept(self.classifier) if second_pass else nullcontext():
            answers = self.classifier(images, *beside)
        logits = answers[: len(targets)]
        loss = self._loss_of(logits, targets)
        if self.loss.consistency:
            views = answers.unflatten(0, (3, len(targets)))
            loss = loss + self.loss.consistency * consistency_loss(views, task=self.task)
        if (teacher := self._teacher[0]) is not None:
            loss = self._taught(loss, logits, teacher, (images, *beside))
        if not second_pass:
            self._count(loss.detach(), logits.detach(), targets)
            self._pending.append((self.global_step, loss.detach(), indices))
        if len(self._pending) >= (1 if loss.device.type == "cpu" else CHECK_EVERY):
            self._check_losses()
        if self.loss.penalty:
            loss = loss + self.loss.penalty * elastic_net(self.classifier, self.loss.l1_ratio)
        return loss * self._group_scale(batch_idx)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Count the batch into `val_loss` and the monitored figure."""
        logits = self.classifier(self._images(batch), *inputs_of(batch)[1:])
        loss = classification_loss(logits, batch["targets"], task=self.task)
        self.val_loss.update(loss, weight=len(logits))
        guesses = probabilities(logits, task=self.task) if self.task == "multilabel" else logits.argmax(dim=1)
        self.val_score.update(guesses, batch["targets"].long())

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Logits (B, num_classes)."""
        return self.classifier(self._images(batch), *inputs_of(batch)[1:])

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip each value, then the norm, as the optimiser's spec says; the trainer's own settings are not used."""
        gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.optim.clip_value is not None:
            torch.nn.utils.clip_grad_value_(gradients, self.optim.clip_value)
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(gradients, self.optim.clip_norm)

    def on_fit_start(self) -> None:
        """Hold the batch norms that are to stay as they are. Processes that train together draw dropout of their own."""
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        if self.classifier.frozen_norms:
            self.classifier.train()

    def on_train_start(self) -> None:
        """Freeze and unfreeze for an epoch that goes on in its middle."""
        self.train_blocks_of(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Freeze and unfreeze for the epoch; remember the learning rate that it begins with."""
        self.train_blocks_of(self.current_epoch)
        group = self.trainer.optimizers[0].param_groups[0]
        self._epoch_lr = self.optim.lr * float(group["lr"]) / float(group["initial_lr"])  # without a group's own factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what has been counted of the epoch. FloatingPointError for a loss that is not finite, before it is stored."""
        self._check_losses()
        checkpoint[COUNTED] = {"lr": self._epoch_lr, "totals": self._totals}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        counted = checkpoint.get(COUNTED)
        if counted is not None:
            self._epoch_lr, totals = counted["lr"], counted["totals"]
            self._totals = None if totals is None else (totals[0], totals[1], totals[2])

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
        """Log `val_loss` and the monitored figure. FloatingPointError where the loss is not finite: the weights are not."""
        if not self.val_loss.compute().isfinite():
            raise FloatingPointError(
                f"the validation loss is {float(self.val_loss.compute())} after epoch {self.current_epoch}: the weights are out of bounds"
            )
        self.log("val_loss", self.val_loss)
        self.log(self.monitor, self.val_score, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, and its schedule by step. ValueError if the trainer has no last step."""
        # Of all that is ever trained: what is frozen at first has no gradient then, and optimisers pass it by.
        self.train_blocks_of(0 if self.mode == "feature-extract" else self.unfreeze_epochs)
        optimizer = self.optim.make(self.classifier.network)
        self.train_blocks_of(self.current_epoch)
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                f"schedule={self.optim.schedule!r} needs the number of steps: give the trainer max_epochs or max_steps"
            )
        total, epochs = max(1, int(total)), self.trainer.max_epochs or 1
        head_steps = round(total * min(1.0, head_epochs(self.mode, self.unfreeze_epochs) / epochs))
        factor = partial(self.optim.factor, total_steps=total, head_steps=head_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_blocks_of(self, epoch: int) -> None:
        """Leave trainable what the mode trains in `epoch`; fine-tune takes the classifier as it is."""
        if self.mode == "fine-tune":
            return
        count = len(blocks_of(self.classifier.network))
        self.classifier.train_blocks(trained_blocks(self.mode, epoch, self.unfreeze_epochs, count))

    def _group_scale(self, batch_idx: int) -> float:
        """Lightning divides by the batches that a step accumulates; an epoch's last step may have fewer."""
        size, count = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        if size == 1 or count == float("inf") or batch_idx < count // size * size:
            return 1.0
        return size / (count % size)

    def _loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return classification_loss(
            logits,
            targets,
            task=self.task,
            name=self.loss.name,
            label_smoothing=self.loss.label_smoothing,
            gamma=self.loss.gamma,
            class_weights=self.class_weights,  # type: ignore[arg-type]
        )

    def _taught(self, loss: Tensor, logits: Tensor, teacher: Classifier, inputs: Inputs) -> Tensor:
        """The loss with the teacher's answers; samples of which it reads nothing are left to their targets."""
        images, *beside = inputs
        shown = None if images is None or "images" not in teacher.reads else images[: len(logits)]
        with torch.no_grad():
            wanted = teacher.to(logits.device)(shown, *(beside if "texts" in teacher.reads else ()))
        share: Tensor | float = 1.0
        if beside and len(teacher.reads) == 1:
            texts, has_image = beside[:2]
            known = has_image if "images" in teacher.reads else texts.ne(0).any(dim=1)  # type: ignore[union-attr]
            share = known.to(loss.dtype).mean()  # type: ignore[union-attr]
            # The student's own answer teaches it nothing.
            wanted = torch.where(known.unsqueeze(1), wanted, logits.detach().to(wanted.dtype))  # type: ignore[union-attr]
        soft = distillation_loss(logits, wanted, task=self.task, temperature=self.loss.temperature)
        return loss * (1 - self.loss.distill * share) + self.loss.distill * soft

    def _sized(self, images: Tensor) -> Tensor:
        """The images at the size that the epoch trains on."""
        full = (images.shape[-2], images.shape[-1])
        height, width = size_at(self.current_epoch, self.trainer.max_epochs or 1, self.start_size, full)
        if (height, width) == full:
            return images
        flat = images.flatten(0, -4) if images.ndim > 4 else images
        small = F.interpolate(flat.float(), (height, width), mode="bilinear", antialias=True)
        return small.unflatten(0, images.shape[:-3]) if images.ndim > 4 else small

    def _mixed(
        self, images: Tensor, targets: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(images, targets, and where there are texts the share of each sample in each)."""
        assert self.mix is not None
        draws, indices = batch.get("repeats"), batch["indices"]
        if "texts" not in batch:
            return *self.mix(images, targets, epoch=self.current_epoch, indices=indices, repeats=draws), None
        # Images are mixed among themselves: a grey square in the place of one is no image of its label.
        rows = batch["has_image"].nonzero().squeeze(1)
        # Samples are mixed as their targets are: what becomes of the columns of a unit matrix tells the shares.
        units = torch.eye(len(targets), dtype=targets.dtype, device=targets.device)
        both = torch.cat([targets, units], dim=1)
        places = rows.to(indices.device)
        where = {"indices": indices[places], "repeats": None if draws is None else draws[places]}
        shown, mixed = self.mix(images[rows], both[rows], epoch=self.current_epoch, **where)
        images = images.to(shown.dtype).index_copy(0, rows, shown)
        return images, *both.index_copy(0, rows, mixed).split([targets.shape[1], len(targets)], dim=1)

    def _images(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        images = batch.get("images")
        if images is None:
            return None
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
            self.log("lr", self._epoch_lr)
            losses, rights, size = (
                total.to(self.device) if isinstance(total, Tensor) else total for total in self._totals
            )
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


def size_at(epoch: int, max_epochs: int, start: float, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that an epoch, counted from 0, trains on: from `start` of `size` in the first to all of it from three quarters of the
    epochs on, at the latest in the last; in steps of 8 pixels. A training of one epoch has the whole size."""
    last = min(max(1, round(0.75 * max_epochs)), max_epochs - 1)
    share = 1.0 if last < 1 else start + (1 - start) * min(1.0, epoch / last)
    if share >= 1:
        return size
    height, width = (max(8, min(side, round(share * side / 8) * 8)) for side in size)
    return height, width
