"""When a loss is no number: which batch, which layer first, and a file that makes it happen again."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from refract.augment import image_size
from refract.models.classifier import Inputs, inputs_of
from refract.pipeline.data.datasets import TrainDataset
from refract.pipeline.files import write_atomically

FILE = "bad-batch.pt"


class Reproducer(Callback):
    """Keep the batch in hand, and where its loss is no number write it to `run_dir`/FILE, with the weights, its samples and their plans.

    facts: what else the file shall hold, plain values; images: what the batches are of. `told`, once that happened: a sentence on the
    layer and the file. On a GPU losses are looked at some steps late, and the batch is the one that was in hand then.
    """

    def __init__(self, run_dir: Path, facts: Mapping[str, Any], images: TrainDataset) -> None:
        self.path, self.facts, self.images, self.told = run_dir / FILE, dict(facts), images, ""
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
        classifier: nn.Module = pl_module.classifier  # type: ignore[assignment]
        found = first_not_finite(classifier, inputs_of(self._batch))
        buffer = io.BytesIO()
        content = {
            "batch": {name: value.cpu() for name, value in self._batch.items() if isinstance(value, Tensor)},
            "weights": {name: value.cpu() for name, value in classifier.state_dict().items()},
            "epoch": trainer.current_epoch, "step": trainer.global_step, **self.facts, "samples": self._samples(trainer.current_epoch),
        }  # fmt: skip
        torch.save(content, buffer)
        write_atomically(self.path, buffer.getvalue())
        self.told = f"{found[0].upper()}{found[1:]}. `refract replay-batch {self.path}` shows it again, layer by layer"

    def _samples(self, epoch: int) -> list[tuple[int, str, str]]:
        """(index, path, plan) of each of the batch."""
        rows = []
        indices, repeats = (self._batch[name].tolist() for name in ("indices", "repeats"))
        for index, repeat in zip(indices, repeats, strict=True):
            sample = self.images.samples[index]
            plan = self.images.augmenter.draw(image_size(sample.read()), epoch=epoch, index=index, repeat=repeat)
            text = self.images.augmented((epoch, index, repeat))[:200] if self.images.tokens is not None else ""
            rows.append((index, sample.path, f"{plan.to_json()} {text}".rstrip()))
        return rows


def first_not_finite(classifier: nn.Module, inputs: Inputs) -> str:
    """In words: the first weight that is not finite, else the first layer whose output is not, else that all are."""
    for name, value in classifier.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return f"the weights are no numbers any more, first of them {name}"
    for name, kind, output in layers(classifier, inputs):
        if not output.isfinite().all():
            return f"the first layer whose output is not finite is {name} ({kind})"
    return "every layer's output is finite: the loss itself is not"


def layers(classifier: nn.Module, inputs: Inputs) -> Iterator[tuple[str, str, Tensor]]:
    """(name, class, output) of each innermost layer, in the order in which they run on the inputs, in training mode."""
    seen: list[tuple[str, str, Tensor]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.append((name, type(module).__name__, output.detach().float().clone()))

        return hook

    leaves = [(name, module) for name, module in classifier.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad(), _as_it_was(classifier):
            classifier.train()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return iter(seen)


@contextmanager
def _as_it_was(classifier: nn.Module) -> Iterator[None]:
    """What looking changes, the statistics of batch norms and the mode, is put back."""
    training, buffers = classifier.training, {name: value.clone() for name, value in classifier.named_buffers()}
    try:
        yield
    finally:
        for name, value in classifier.named_buffers():
            value.copy_(buffers[name])
        classifier.train(training)
