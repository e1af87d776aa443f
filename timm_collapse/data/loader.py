"""A loader whose sample and augmentation at any step depend only on the seed and the step.

So a resumed run continues bit for bit, and two processes see what one would see with twice the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from ..order import CollapseError
from .images import Cover


class ImageLoader(DataLoader):
    """A DataLoader whose workers' CollapseErrors stay one line; torch wraps them into the worker's stack trace.

    Memory is pinned where there is a GPU.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, pin_memory=torch.cuda.is_available(), **kwargs)

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except CollapseError as error:
            raise CollapseError(str(error).rsplit("CollapseError: ", 1)[-1].strip()) from None


def train_transform(img_size: int, mean, std, scale: tuple[float, float] = (0.5, 1.0), flip: bool = True) -> Callable:
    """Random resized crop and flip, to normalised (3, S, S)."""
    steps = [T.RandomResizedCrop(img_size, scale=scale, ratio=(0.9, 1.1), interpolation=T.InterpolationMode.BICUBIC)]
    if flip:
        steps.append(T.RandomHorizontalFlip())
    return T.Compose([*steps, T.ToTensor(), T.Normalize(mean, std)])


def eval_transform(img_size: int, mean, std) -> Callable:
    """Shorter side to S, centre crop, to normalised (3, S, S)."""
    return T.Compose([Cover(img_size), T.ToTensor(), T.Normalize(mean, std)])


class _Transformed(Dataset):
    """Reads (position, index): the position seeds the augmentation, the index names the sample."""

    def __init__(self, dataset: Dataset, transform: Callable | None, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        position, index = key
        state, python_state = torch.get_rng_state(), random.getstate()
        torch.manual_seed((self.seed * 1_000_003 + position) % 2**63)
        random.seed(self.seed * 1_000_003 + position)
        try:
            image, *rest = self.dataset[index]
            return (image if self.transform is None else self.transform(image)), *rest
        finally:
            torch.set_rng_state(state)
            random.setstate(python_state)


class _Steps(Sampler):
    """Batches of (position, index) for some steps; every epoch is its own permutation."""

    def __init__(self, length: int, batch: int, steps: range, seed: int, rank: int, world: int):
        self.length, self.batch, self.steps, self.seed, self.rank, self.world = length, batch, steps, seed, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutations: dict[int, Tensor] = {}
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch
            keys = []
            for position in range(first, first + self.batch):
                epoch, offset = divmod(position, self.length)
                if epoch not in permutations:
                    generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
                    permutations = {epoch: torch.randperm(self.length, generator=generator)} | (
                        {epoch - 1: permutations[epoch - 1]} if epoch - 1 in permutations else {}
                    )
                keys.append((position, int(permutations[epoch][offset])))
            yield keys


class StepLoader:
    """Iterates over batches (images, labels, ...), one a micro-step.

    Args:
        dataset: Map-style (image, label, ...); what it draws from torch's generator depends on the seed and the step.
        transform: Image -> tensor; None where the data set yields tensors.
        batch: Images per process and micro-step.
        steps: The micro-steps to serve.
        seed: Seed of order and augmentation.
        rank, world: This process and the number of processes: they take contiguous parts of the global batch.
        workers: DataLoader workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable | None,
        batch: int,
        steps: range,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ):
        self.loader = ImageLoader(
            _Transformed(dataset, transform, seed),
            batch_sampler=_Steps(len(dataset), batch, steps, seed, rank, world),
            num_workers=workers,
        )

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)
