"""Diagnose a non-finite loss: the batch, the first layer with non-finite output, and a file that reproduces it."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refract.augment import image_size
from refract.models.classifier import Inputs, inputs_of
from refract.models.training.lightning_imports import Callback, lightning
from refract.pipeline.data.datasets import TrainDataset
from refract.pipeline.files import write_atomically

FILE = "bad-batch.pt"


class Reproducer(Callback):
    """Writes the current batch to `run_dir`/FILE if its loss is not finite, with the weights, the samples and their plans.

    facts: further plain values for the file; images: the data set of the batches. `message` is then a sentence about the layer and the
    file, before that empty. On a GPU losses are checked some steps late, so the batch is the current one at that time.
    """

    def __init__(self, run_dir: Path, facts: Mapping[str, Any], images: TrainDataset) -> None:
        self.path, self.facts, self.images, self.message = run_dir / FILE, dict(facts), images, ""
        self._batch: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, FloatingPointError) or not self._batch or not trainer.is_global_zero:
            return
        from refract.models.training.lora import merged_state

        classifier: nn.Module = pl_module.classifier  # type: ignore[assignment]
        diagnosis = first_not_finite(classifier, inputs_of(self._batch))
        buffer = io.BytesIO()
        content = {
            "batch": {name: value.cpu() for name, value in self._batch.items() if isinstance(value, Tensor)},
            "weights": {name: value.cpu() for name, value in merged_state(classifier).items()},
            "epoch": trainer.current_epoch, "step": trainer.global_step, **self.facts, "samples": self._samples(trainer.current_epoch),
        }  # fmt: skip
        torch.save(content, buffer)
        write_atomically(self.path, buffer.getvalue())
        replay = f"`refract replay-batch {self.path}` reproduces it layer by layer"
        self.message = f"{diagnosis[0].upper()}{diagnosis[1:]}. {replay}"

    def _samples(self, epoch: int) -> list[tuple[int, str, str]]:
        """Return (index, path, plan with the augmented text) of each sample of the batch."""
        rows = []
        indices, repeats = (self._batch[name].tolist() for name in ("indices", "repeats"))
        for index, repeat in zip(indices, repeats, strict=True):
            sample = self.images.samples[index]
            plan = self.images.augmenter.draw(image_size(sample.read()), epoch=epoch, index=index, repeat=repeat)
            text = self.images.augmented((epoch, index, repeat))[:200] if self.images.tokens is not None else ""
            rows.append((index, sample.path, f"{plan.to_json()} {text}".rstrip()))
        return rows


def first_not_finite(classifier: nn.Module, inputs: Inputs) -> str:
    """Return a sentence about the first non-finite weight, else the first layer with non-finite output, else the loss."""
    for name, value in classifier.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return f"the weights are no longer finite, the first of them is {name}"
    for name, kind, output in layers(classifier, inputs):
        if not output.isfinite().all():
            return f"the first layer with non-finite output is {name} ({kind})"
    return "every layer's output is finite, but the loss is not"


def layers(classifier: nn.Module, inputs: Inputs) -> Iterator[tuple[str, str, Tensor]]:
    """Run the classifier in training mode and return (name, class, output) of each leaf module, in their order of execution."""
    outputs: list[tuple[str, str, Tensor]] = []

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, type(module).__name__, output.detach().float().clone()))

        return hook

    leaves = [(name, module) for name, module in classifier.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(recorder(name)) for name, module in leaves]
    try:
        with torch.no_grad(), _preserved_state(classifier):
            classifier.train()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return iter(outputs)


@contextmanager
def _preserved_state(classifier: nn.Module) -> Iterator[None]:
    """Restore the buffers, such as batch norm statistics, and the training mode after the block."""
    training, buffers = classifier.training, {name: value.clone() for name, value in classifier.named_buffers()}
    try:
        yield
    finally:
        for name, value in classifier.named_buffers():
            value.copy_(buffers[name])
        classifier.train(training)
