"""The denoiser's optimiser: Muon for everything that multiplies, AdamW for the rest.

Muon makes every update orthogonal: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; its scale is
that of AdamW's: Liu et al. (2025), https://arxiv.org/abs/2502.16982, section 2.2. torch's takes matrices only, so a
convolution is shown to it as one: its output channels by all that they are made of.
"""

from concurrent.futures import Executor
from typing import Any

import torch

WEIGHT_DECAY = 0.01


class Optimiser:
    """Several optimisers that are used as one: Muon in parts of about the same work, and AdamW."""

    def __init__(self, model: torch.nn.Module, num_parts: int = 1):
        """Take all parameters of a model in the memory format channels-last, which they have to keep."""
        weights = sorted((weight for weight in model.parameters() if weight.ndim > 1), key=lambda weight: -weight.numel())
        self.matrices = [(weight, _as_matrix(weight)) for weight in weights]
        rest = [weight for weight in model.parameters() if weight.ndim <= 1]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [matrix for _, matrix in self.matrices[first::num_parts]],
                weight_decay=WEIGHT_DECAY,
                adjust_lr_fn="match_rms_adamw",
            )
            for first in range(num_parts)
        ]
        self.parts.append(torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0, fused=True))

    def step(self, learning_rate: float, executor: Executor) -> None:
        """Take one step along the gradients, each part in a thread of the executor, and forget them."""
        for weight, matrix in self.matrices:
            matrix.grad = _turned(weight.grad)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
        list(executor.map(lambda part: part.step(), self.parts))
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for weight, _ in self.matrices:
            weight.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what `load_state_dict` takes."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from a state."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def _as_matrix(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a parameter that shares the weight's memory, (outputs, inputs)."""
    matrix = torch.nn.Parameter(_turned(weight.data))
    assert matrix.data_ptr() == weight.data_ptr(), f"{tuple(weight.shape)} is not channels-last"
    return matrix


def _turned(values: torch.Tensor) -> torch.Tensor:
    return values if values.ndim == 2 else values.permute(0, 2, 3, 1).flatten(1)
