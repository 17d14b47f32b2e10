"""Where a network looked: the places of its last feature map that speak for a label. Knows nothing of HTTP."""

import threading
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from models.classifier import Classifier


class Explainer:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, section 3) on the last layer whose output has more than one place.

    `available` is False for a network without such a layer: a perceptron, a transformer of tokens.
    """

    def __init__(self, classifier: Classifier, image: np.ndarray) -> None:
        """image: any uint8 H×W×3 of the network's size, to find the layer by."""
        self._classifier = classifier
        self._layer = _last_map(classifier, _tensor(classifier, image))

    @property
    def available(self) -> bool:
        return self._layer is not None

    def heat(self, image: np.ndarray, label: int) -> np.ndarray:
        """uint8 H×W×3 → float32 H×W in 0…1, 1 where it speaks most for the label; all 0 where nothing does. Any thread may call it."""
        assert self._layer is not None, "not available"
        seen: list[Tensor] = []
        mine = threading.get_ident()

        def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if threading.get_ident() != mine:  # the inference thread computes with the same network
                return None
            seen.append(output.detach().requires_grad_())
            return seen[-1].clone()  # what follows may change it in place

        hook = self._layer.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                logit = self._classifier(_tensor(self._classifier, image))[0, label]
                (gradient,) = torch.autograd.grad(logit, seen[-1])
        finally:
            hook.remove()
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        found = (weights * seen[-1]).sum(dim=1)[0].clamp(min=0).detach().float().cpu().numpy()
        heat = cv2.resize(found, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)
        return heat / max(float(heat.max()), 1e-12)


def png(heat: np.ndarray) -> bytes:
    """A heat map as a picture to lay over another: red where it is hot, transparent where it is not."""
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_JET)
    layer = np.dstack([colours, (heat * 180).astype(np.uint8)])
    return bytes(cv2.imencode(".png", layer)[1])


def _tensor(classifier: Classifier, image: np.ndarray) -> Tensor:
    device = next(classifier.parameters()).device
    return torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None]


def _last_map(classifier: Classifier, images: Tensor) -> nn.Module | None:
    """The last leaf, in the order of execution, whose output is N×C×H×W with more than one place."""
    found: list[nn.Module] = []
    mine = threading.get_ident()

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if (
            threading.get_ident() == mine
            and isinstance(output, Tensor)
            and output.ndim == 4
            and output.shape[2] * output.shape[3] > 1
        ):
            found.append(module)

    leaves = [module for module in classifier.network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(look) for leaf in leaves]
    try:
        with torch.inference_mode():
            classifier(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found else None
