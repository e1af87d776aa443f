"""Moving average of a model's state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checkpoint import local


class Ema:
    """Exponential moving average of a model's state, in the layout of its tensors: what is sharded stays sharded.

    Args:
        model: Starts the average.
        decay: In (0, 1); warmed up as timm's `ModelEmaV3` does: 1 - step^(-2/3) as long as that is less.

    Attributes:
        state: Name -> averaged tensor, as in the model's state dict.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model after optimizer step `step`, counted from 1."""
        decay = min(self.decay, 1 - step ** (-2 / 3))
        averaged, new = [], []
        for name, value in model.state_dict().items():
            mine, value = local(self.state[name]), local(value)
            if mine.is_floating_point():
                averaged.append(mine)
                new.append(value)
            else:
                mine.copy_(value)
        torch._foreach_lerp_(averaged, new, 1 - decay)
