"""Data sets of (image, label, order): samples beside the orders of a table, mirrored at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .datasets import as_images
from .latents import LatentCache
from .orders import OrderTable


class OrderedImages(Dataset):
    """(image, label, ranks): an image or its mirror image, its label, and the ranks (N,) long of its patches.

    Whether it is the mirror image is drawn from torch's generator, which `StepLoader` seeds for every sample.

    Args:
        dataset: Map-style (PIL image, label).
        table: The orders of its images, on the grid `table.grid`.
        transform: PIL image -> tensor (C, H, W), the one with which the orders were made.
        mirror: Share of mirror images, in [0, 1].
    """

    def __init__(self, dataset: Dataset, table: OrderTable, transform: Callable, mirror: float = 0.5):
        self.dataset, self.table, self.transform, self.mirror = as_images(dataset), table, transform, mirror

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        image, label = self.dataset[index]
        mirrored = torch.rand(1) < self.mirror
        image = self.transform(image)
        return image.flip(-1) if mirrored else image, int(label), _ranks(self.table, index, mirrored)


class OrderedLatents(Dataset):
    """(latents, label) or, with a table of orders, (latents, label, ranks); otherwise as `OrderedImages`.

    Latents (C, h, w) of a VAE are drawn anew from the image's posterior every time.

    Args:
        cache: The latents of a data set.
        table: The orders of its images; None: there are none.
        mirror: Share of mirror images, in [0, 1].
    """

    def __init__(self, cache: LatentCache, table: OrderTable | None = None, mirror: float = 0.0):
        self.cache, self.table, self.mirror = cache, table, mirror

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[Tensor, int, Tensor]:
        record, _ = self.cache[index]
        mirrored = torch.rand(1) < self.mirror
        latents = self.cache.latents(record.unsqueeze(0), mirrored, torch.randn(1, *self.cache.latent_shape))[0]
        sample = latents, int(self.cache.labels[index])
        return sample if self.table is None else (*sample, _ranks(self.table, index, mirrored))


def _ranks(table: OrderTable, index: int, mirrored: Tensor) -> Tensor:
    return table.lookup(torch.tensor([index]), mirrored).ranks[0]
