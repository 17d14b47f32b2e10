"""Sharpness-aware minimisation as a wrapper of any optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SAM(torch.optim.Optimizer):
    """Take the base optimiser's step with the gradient at w + ρ g / ‖g‖ instead of the gradient at w.

    `step` calls its closure twice, which must compute the loss and the gradients; `second_pass` is True in the second call.
    Source: Foret et al. 2021, arXiv:2010.01412, equations 2 and 3, without the adaptive variant.
    """

    def __init__(
        self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], *, rho: float
    ) -> None:
        if not rho > 0:
            raise ValueError(f"rho={rho!r}: expected a number above 0")
        self.base, self.rho, self.second_pass = make(groups), rho, False
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups = self.base.param_groups  # one list, so that a schedule moves both
        self.state = self.base.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights once. Returns the loss at w. ValueError without a closure."""
        if closure is None:
            raise ValueError("SAM.step needs a closure that computes the loss and the gradients")
        with torch.enable_grad():
            loss = closure()
        moved = self._climb()
        try:
            self.second_pass = True
            with torch.enable_grad():
                closure()
        finally:
            self.second_pass = False
            for parameter, before in moved:
                parameter.copy_(before)
        self.base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimiser's state."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimiser's state."""
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def _climb(self) -> list[tuple[Tensor, Tensor]]:
        """Move the weights by ρ along the gradient, about where the loss is largest nearby. Returns (parameter, previous value) pairs."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return []
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]))
        moved = []
        for parameter in parameters:
            moved.append((parameter, parameter.detach().clone()))
            parameter.add_(parameter.grad * (self.rho / (norm + 1e-12)))
        return moved
