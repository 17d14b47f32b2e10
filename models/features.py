"""A classifier together with its features: one forward pass returns the logits and the embedding. Independent of files and servers."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from refract.models.classifier import Classifier
from refract.models.head import called_head, pooled


class FeatureClassifier(nn.Module):
    """Compute the logits and the embedding of `classifier` in one forward pass.

    The arguments are those of `Classifier.forward`. Returns (logits (N, C), embedding (N, D)), both in the dtype of the network. The
    embedding is the pooled input of the head, see `refract.models.head.head_inputs`. If the network does not call its head, the embedding
    is the logits.

    torch.compile, torch.export, torch.jit.trace and CUDA graphs accept the module. Concurrent threads may call it. A hook on the head of
    `classifier` records the embedding; `copy.deepcopy` copies the hook too.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier, self.training = classifier, classifier.training
        # One entry for each thread that computes a forward pass.
        self._embeddings: dict[int, Tensor | None] = {}
        called_head(classifier.network).register_forward_pre_hook(self._record)

    def forward(
        self, images: Tensor | None, texts: Tensor | None = None, has_image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.recorded(self.classifier, images, texts, has_image)

    def recorded(self, module: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Call `module`, the classifier or its network, and return its logits and the embedding."""
        thread = _thread()
        self._embeddings[thread] = None
        logits = module(*inputs)
        embedding = self._embeddings.pop(thread)
        return logits, logits if embedding is None else embedding

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        thread = _thread()
        if thread in self._embeddings:  # not in a call of the classifier alone
            self._embeddings[thread] = pooled(args[0], channels_first=isinstance(module, nn.Conv2d))


def _thread() -> int:
    """Return the number of the current thread. A compiler cannot trace the thread's number, and copies the module anyway."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
