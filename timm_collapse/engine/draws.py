"""Random numbers that depend on the seed and on what they are for, not on the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Draws of a training: for each sample its own, so that a process draws no more than it uses.

    A sample is known by its place in the stream of training samples, whichever process sees it: W processes draw what
    one process with the whole batch would draw.

    Args:
        seed: The run's.
        rank, world: This process and the number of processes: they take contiguous parts of the global batch.
        device: Where drawn tensors go.
    """

    def __init__(self, seed: int, rank: int, world: int, device: torch.device | str = "cpu"):
        self.seed, self.rank, self.world, self.device = seed, rank, world, torch.device(device)
        self.quantile: float | None = None  # in a dry run: what stands for the draws that all processes share
        self.restart(0)

    def restart(self, number: int) -> None:
        """Begin micro-step `number`, whose draws depend on no earlier one."""
        self.number = number
        self._shared = torch.Generator().manual_seed(self.seed * 15_485_863 + number)
        self._samples: list[torch.Generator] = []

    def rand(self, batch: int, *shape: int) -> Tensor:
        """Uniform (batch, *shape) in [0, 1) for the samples of this process."""
        return self._draw(torch.rand, batch, shape)

    def randn(self, batch: int, *shape: int) -> Tensor:
        """Normal (batch, *shape) for the samples of this process."""
        return self._draw(torch.randn, batch, shape)

    def randint(self, low: int, high: int) -> int:
        """One integer in [low, high), the same in every process."""
        if self.quantile is not None:
            return low + int(self.quantile * (high - low))
        return int(torch.randint(low, high, (), generator=self._shared))

    def uniform(self) -> float:
        """One number in [0, 1), the same in every process."""
        return float(torch.rand((), generator=self._shared)) if self.quantile is None else self.quantile

    def _draw(self, draw, batch: int, shape: tuple[int, ...]) -> Tensor:
        if len(self._samples) != batch:
            first = (self.number * self.world + self.rank) * batch
            self._samples = [_generator(self.seed, first + i) for i in range(batch)]
        drawn = torch.empty(batch, *shape)
        for row, generator in zip(drawn, self._samples):
            draw(shape, generator=generator, out=row)
        return drawn.to(self.device)


def _generator(seed: int, place: int) -> torch.Generator:
    """Of one sample. Only 32 bits of a seed count; an odd factor keeps 2^32 places apart and spreads near ones."""
    return torch.Generator().manual_seed((place * 2_654_435_769 + seed * 32_452_843 + 1) % 2**32)
