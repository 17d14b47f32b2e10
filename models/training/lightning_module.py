"""The Lightning module of a classifier: training and validation steps, metrics, optimiser.

Independent of data sets, trackers and augmentation: the caller passes `mix`.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refract.models.classifier import Classifier, Inputs, inputs_of, probabilities
from refract.models.tasks import check_task
from refract.models.training.activation_checkpointing import frozen_batch_statistics
from refract.models.training.freezing import blocks_of, head_epochs, trained_blocks
from refract.models.training.lightning_imports import (
    MeanMetric,
    Metric,
    MulticlassAccuracy,
    MultilabelAveragePrecision,
    OptimizerLRScheduler,
    dim_zero_cat,
    lightning,
)
from refract.models.training.objective import (
    check_targets,
    classification_loss,
    consistency_loss,
    distillation_loss,
    elastic_net,
    soft_targets,
)
from refract.models.training.rank_values import copy_buffers_of_rank_0, values_of_ranks
from refract.models.training.sharding import shard
from refract.models.training.specs import LossSpec, OptimSpec

Mix = Callable[..., tuple[Tensor, Tensor]]

# On a GPU, reading a loss waits for the device. The losses therefore stay there, and the module checks them together every 50 steps and
# at the end of an epoch. On the CPU, where reading is free, it checks at every step.
CHECK_EVERY = 50

TOTALS_KEY = "counted_of_the_epoch"
"""The checkpoint's key for the totals of an unfinished epoch."""


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean of the labels' average precision, a multi-label metric that needs no threshold.

    Labels without a positive sample are excluded. 0 if no label has one.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average=None, validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics overrides it alike
        """Return a scalar in 0…1."""
        positive = dim_zero_cat(self.target).gt(0).any(dim=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples")
            values = super().compute()
        return values[positive].mean() if positive.any() else values.new_zeros(())


class ClassifierModule(lightning.LightningModule):
    """Train a `Classifier`.

    Batches are dicts:
    - `images`: uint8 (B, 3, H, W); absent for a classifier that reads only texts
    - `targets`: int64 (B,), or float32 (B, num_classes) for multilabel
    - `indices`: int64 (B,), the samples' positions in the data set
    - `repeats`, in training: int64 (B,), how often the epoch drew the sample before; absent means 0
    - `texts` int32 (B, L) and `has_image` bool (B,): for a classifier that reads texts

    Arguments:
    - mix(images, targets, *, epoch, indices, repeats) → (images, soft targets (B, num_classes)) on the device, in training only
    - loss.consistency: above 0, training images are (B, 3, 3, H, W), three views of each image; the loss is that of the first views plus
      this many times `consistency_loss`
    - class_weights, class_counts: (num_classes,), for the training loss, see `classification_loss`
    - mode, unfreeze_epochs: the trained blocks of each epoch, see `refract.models.training.freezing`
    - teacher: a classifier to distil, weighted by loss.distill; it reads no other inputs than this one and has the same tokenizer
    - teacher_size: (height, width) to which the teacher's images are resized, None for the size of the batch
    - start_size: the fraction of the image's sides in the first epoch; it rises to 1 at three quarters of the epochs, in steps of 8
      pixels (Howard 2018; Tan & Le 2021, arXiv:2104.00298, section 4)

    Logs `lr`, `train_loss`, `train_accuracy`, `val_loss` and `monitor` once an epoch. Training metrics come from the step's logits on the
    mixed batches and smoothed targets, without the penalty. `val_loss` has no smoothing, weights or penalty.
    ValueError for an unknown task or mode, or a target out of range. FloatingPointError for a non-finite training loss, at most CHECK_EVERY
    steps late; the message names the step with that loss.
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
        class_counts: Tensor | None = None,
        mode: str = "fine-tune",
        unfreeze_epochs: int = 1,
        teacher: Classifier | None = None,
        teacher_size: tuple[int, int] | None = None,
        start_size: float = 1.0,
    ) -> None:
        super().__init__()
        check_task(task)
        trained_blocks(mode, 0, unfreeze_epochs, 1)
        self.classifier = classifier.to(memory_format=torch.channels_last) if channels_last else classifier
        self.task, self.num_classes, self.mix, self.channels_last = task, num_classes, mix, channels_last
        self.optim, self.loss = optim or OptimSpec(lr=1e-3), loss or LossSpec()
        self.mode, self.unfreeze_epochs, self.start_size = mode, unfreeze_epochs, start_size
        # In a tuple, so that the teacher is not a submodule and not in the checkpoints.
        self._teacher = (None if teacher is None else teacher.eval().requires_grad_(False),)
        self.teacher_size = teacher_size
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("class_counts", class_counts, persistent=False)
        self.train_loss, self.train_accuracy, self.val_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_score: Metric = (
            MeanAveragePrecision(num_classes)
            if task == "multilabel"
            else MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        )
        self._epoch_lr = 0.0
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # step, loss, indices: not checked yet
        self._totals: tuple[Tensor, Tensor, int] | None = None  # the epoch's sums: loss, correct predictions, samples

    @property
    def monitor(self) -> str:
        """The validation metric to maximise. For multi-label it needs no threshold, as thresholds are tuned after training."""
        return "val_map" if self.task == "multilabel" else "val_accuracy"

    def forward(self, images: Tensor | None, *more: Tensor) -> Tensor:
        """Call the classifier."""
        return self.classifier(images, *more)

    def on_before_batch_transfer(self, batch: Mapping[str, Tensor], dataloader_idx: int) -> Mapping[str, Tensor]:
        """Check the targets while they are on the CPU, where the check does not wait for the device."""
        check_targets(batch["targets"], self.num_classes, self.task)
        return batch

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the batch's loss. Only the check of pending losses reads values from the device."""
        images, indices, mixed = self._images(batch), batch["indices"], None
        images = None if images is None else self._sized(images)
        targets = soft_targets(batch["targets"], self.num_classes, self.task)
        if self.mix is not None and images is not None:
            images, targets, mixed = self._mixed(images, targets, batch)
        if self.loss.consistency and images is not None:
            images = images.transpose(0, 1).flatten(0, 1)
        text_inputs = (*inputs_of(batch)[1:], *(() if mixed is None else (mixed,)))
        second_pass = getattr(self.optimizers(use_pl_optimizer=False), "second_pass", False)
        with frozen_batch_statistics(self.classifier) if second_pass else nullcontext():
            all_logits = self.classifier(images, *text_inputs)
        logits = all_logits[: len(targets)]
        loss = self._loss_of(logits, targets)
        if self.loss.consistency:
            views = all_logits.unflatten(0, (3, len(targets)))
            loss = loss + self.loss.consistency * consistency_loss(views, task=self.task)
        if (teacher := self._teacher[0]) is not None:
            loss = self._distilled(loss, logits, teacher, (images, *text_inputs))
        if not second_pass:
            self._count(loss.detach(), logits.detach(), targets)
            self._pending.append((self.global_step, loss.detach(), indices))
        if len(self._pending) >= (1 if loss.device.type == "cpu" else CHECK_EVERY):
            self._check_losses()
        if self.loss.penalty:
            loss = loss + self.loss.penalty * elastic_net(self.classifier, self.loss.l1_ratio)
        return loss * self._group_scale(batch_idx)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the batch to `val_loss` and the monitored metric."""
        logits = self.classifier(self._images(batch), *inputs_of(batch)[1:])
        loss = classification_loss(logits, batch["targets"], task=self.task)
        self.val_loss.update(loss, weight=len(logits))
        predictions = probabilities(logits, task=self.task) if self.task == "multilabel" else logits.argmax(dim=1)
        self.val_score.update(predictions, batch["targets"].long())

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the logits (B, num_classes)."""
        return self.classifier(self._images(batch), *inputs_of(batch)[1:])

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip each value, then the norm, by the limits of `optim`. The trainer's settings are ignored."""
        gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.optim.clip_value is not None:
            torch.nn.utils.clip_grad_value_(gradients, self.optim.clip_value)
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(gradients, self.optim.clip_norm)

    def configure_model(self) -> None:
        """Shard the classifier if the strategy has a mesh of ranks."""
        if self._device_mesh is not None:
            shard(self.classifier, self._device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Seed each rank differently, so that the ranks draw different dropout masks, and freeze batch norms under `frozen_norms`."""
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        if self.classifier.frozen_norms:
            self.classifier.train()

    def on_train_start(self) -> None:
        """Set the trainable blocks for a run that resumes within an epoch."""
        self.train_blocks_of(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Set the trainable blocks of the epoch, and store its first learning rate for the log."""
        self.train_blocks_of(self.current_epoch)
        group = self.trainer.optimizers[0].param_groups[0]
        self._epoch_lr = (
            self.optim.peak_lr * float(group["lr"]) / float(group["initial_lr"])
        )  # without the group's factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the epoch's totals of all ranks. FloatingPointError for a non-finite loss, before the checkpoint is written."""
        self._check_losses()
        totals = self._totals and (self._totals[0].cpu(), self._totals[1].cpu(), self._totals[2])
        every = values_of_ranks(totals)
        checkpoint[TOTALS_KEY] = {"lr": self._epoch_lr, "totals": every[0], "further_ranks": every[1:]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the epoch's totals of this rank; with another number of ranks, rank 0 counts those of all."""
        counted = checkpoint.get(TOTALS_KEY)
        if counted is not None:
            self._epoch_lr, every = counted["lr"], [counted["totals"], *counted.get("further_ranks", [])]
            if len(every) == self.trainer.world_size:
                totals = every[self.global_rank]
            else:
                sums = [sum(parts) for parts in zip(*filter(None, every), strict=True)]
                totals = sums if sums and self.global_rank == 0 else None
            self._totals = None if totals is None else (totals[0], totals[1], totals[2])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log at the epoch's last batch, because this module's `on_train_epoch_end` runs after that of callbacks."""
        if self.trainer.is_last_batch:
            self._log_epoch()

    def on_train_epoch_end(self) -> None:
        """Log the totals of an epoch that stops early."""
        self._log_epoch()

    def on_validation_epoch_start(self) -> None:
        """Check the training losses before validation can select a checkpoint, and validate with the batch norms of rank 0."""
        self._check_losses()
        copy_buffers_of_rank_0(self.classifier)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and the monitored metric. FloatingPointError for a non-finite loss, as the weights are then unusable."""
        if not self.val_loss.compute().isfinite():
            raise FloatingPointError(
                f"the validation loss is {float(self.val_loss.compute())} after epoch {self.current_epoch}: "
                "training diverged; try a lower lr or a longer warmup"
            )
        self.log("val_loss", self.val_loss)
        self.log(self.monitor, self.val_score)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and its per-step schedule. ValueError if the trainer has no limit of epochs or steps."""
        # Include every block that a later epoch trains. Frozen parameters have no gradient, so the optimiser skips them until then.
        self.train_blocks_of(0 if self.mode == "feature-extract" else self.unfreeze_epochs)
        optimizer = self.optim.make(self.classifier.network)
        self.train_blocks_of(self.current_epoch)
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                f"schedule={self.optim.schedule!r} needs the number of steps: set the trainer's max_epochs or max_steps"
            )
        total, epochs = max(1, int(total)), self.trainer.max_epochs or 1
        head_steps = round(total * min(1.0, head_epochs(self.mode, self.unfreeze_epochs) / epochs))
        factor = partial(self.optim.factor, total_steps=total, head_steps=head_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_blocks_of(self, epoch: int) -> None:
        """Make the blocks trainable that the mode trains in `epoch`. The modes fine-tune and lora change nothing."""
        if self.mode in ("fine-tune", "lora"):
            return
        count = len(blocks_of(self.classifier.network))
        self.classifier.train_blocks(trained_blocks(self.mode, epoch, self.unfreeze_epochs, count))

    def _group_scale(self, batch_idx: int) -> float:
        """Return a factor on the loss that corrects the epoch's last step.

        Lightning divides the loss by `accumulate_grad_batches`, but the last step may accumulate fewer batches.
        """
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
            class_counts=self.class_counts,  # type: ignore[arg-type]
        )

    def _distilled(self, loss: Tensor, logits: Tensor, teacher: Classifier, inputs: Inputs) -> Tensor:
        """Combine the loss with the distillation loss. Samples without an input for the teacher learn from their targets alone."""
        images, *text_inputs = inputs
        teacher_images = None if images is None or "images" not in teacher.reads else images[: len(logits)]
        if teacher_images is not None and self.teacher_size is not None:
            teacher_images = F.interpolate(teacher_images.float(), self.teacher_size, mode="bilinear", antialias=True)
        with torch.no_grad():
            teacher_texts = text_inputs if "texts" in teacher.reads else ()
            teacher_logits = teacher.to(logits.device)(teacher_images, *teacher_texts)
        fraction: Tensor | float = 1.0
        if text_inputs and len(teacher.reads) == 1:
            texts, has_image = text_inputs[:2]
            readable = has_image if "images" in teacher.reads else texts.ne(0).any(dim=1)  # type: ignore[union-attr]
            fraction = readable.to(loss.dtype).mean()  # type: ignore[union-attr]
            # Against its own logits the student has a distillation loss of 0 without a gradient.
            own_logits = logits.detach().to(teacher_logits.dtype)
            teacher_logits = torch.where(readable.unsqueeze(1), teacher_logits, own_logits)  # type: ignore[union-attr]
        soft = distillation_loss(logits, teacher_logits, task=self.task, temperature=self.loss.temperature)
        return loss * (1 - self.loss.distill * fraction) + self.loss.distill * soft

    def _sized(self, images: Tensor) -> Tensor:
        """Resize the images to the epoch's size."""
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
        """Mix the batch. Returns (images, targets, mixing weights (B, B) of the samples, or None without texts)."""
        assert self.mix is not None
        repeats, indices = batch.get("repeats"), batch["indices"]
        if "texts" not in batch:
            return *self.mix(images, targets, epoch=self.current_epoch, indices=indices, repeats=repeats), None
        # Mix only samples that have an image: the grey placeholder of the others does not show their label.
        rows = batch["has_image"].nonzero().squeeze(1)
        # The mix treats an identity matrix like the targets, which turns it into the mixing weights.
        identity = torch.eye(len(targets), dtype=targets.dtype, device=targets.device)
        both = torch.cat([targets, identity], dim=1)
        positions = rows.to(indices.device)
        chosen = {"indices": indices[positions], "repeats": None if repeats is None else repeats[positions]}
        mixed_images, mixed = self.mix(images[rows], both[rows], epoch=self.current_epoch, **chosen)
        images = images.to(mixed_images.dtype).index_copy(0, rows, mixed_images)
        return images, *both.index_copy(0, rows, mixed).split([targets.shape[1], len(targets)], dim=1)

    def _images(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        images = batch.get("images")
        if images is None:
            return None
        channels_last = self.channels_last and images.ndim == 4
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images

    def _count(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add the batch to the epoch's totals, on the device.

        A prediction is correct if it is the label with the largest target; for multilabel the fraction of correct decisions counts.
        """
        if self.task == "multilabel":
            correct = ((logits > 0) == (targets > 0.5)).float().mean(dim=1).sum()
        else:
            correct = (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        size = len(logits)
        if self._totals is None:
            self._totals = loss * size, correct, size
        else:
            total_loss, total_correct, total_size = self._totals
            self._totals = total_loss + loss * size, total_correct + correct, total_size + size

    def _log_epoch(self) -> None:
        self._check_losses()
        if self._totals is not None:
            self.log("lr", self._epoch_lr)
            total_loss, total_correct, size = (
                total.to(self.device) if isinstance(total, Tensor) else total for total in self._totals
            )
            # torchmetrics averages over the ranks. The metrics are updated once an epoch, so that they cost nothing in a step.
            for name, metric, total in (
                ("train_loss", self.train_loss, total_loss),
                ("train_accuracy", self.train_accuracy, total_correct),
            ):
                metric.update(total / size, weight=size)
                self.log(name, metric, on_step=False, on_epoch=True)
            self._totals = None

    def _check_losses(self) -> None:
        """Raise FloatingPointError for the first pending loss that is not finite."""
        pending, self._pending = self._pending, []
        if not pending or bool(torch.stack([loss for _, loss, _ in pending]).isfinite().all()):
            return
        step, loss, indices = next(entry for entry in pending if not entry[1].isfinite())
        raise FloatingPointError(
            f"the training loss is {float(loss)} in epoch {self.current_epoch}, step {step}, "
            f"samples {indices[:8].tolist()}…: try a lower lr or a longer warmup, or inspect these samples"
        )


def size_at(epoch: int, max_epochs: int, start: float, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the images in an epoch, counted from 0, in steps of 8 pixels.

    It rises linearly from `start` · `size` in the first epoch to `size` at three quarters of the epochs, at the latest in the last epoch.
    A run of one epoch uses the whole size.
    """
    ramp_epochs = min(max(1, round(0.75 * max_epochs)), max_epochs - 1)
    fraction = 1.0 if ramp_epochs < 1 else start + (1 - start) * min(1.0, epoch / ramp_epochs)
    if fraction >= 1:
        return size
    height, width = (max(8, min(side, round(fraction * side / 8) * 8)) for side in size)
    return height, width
