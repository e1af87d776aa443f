"""Orders of a whole data set, computed once: for training with no other augmentation than mirroring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..order import CollapseError, Order


class Indexed(Dataset):
    """A data set whose label is the index of the sample."""

    def __init__(self, dataset: Dataset, transform: Callable | None = None):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        image, _ = self.dataset[index]
        return (self.transform(image) if self.transform else image), index


class OrderTable:
    """Ranks of the patches of every image of a data set and of its mirror image.

    Args:
        ranks: (2, n, N) of an integer type: the images, then their mirror images.
        grid: Rows and columns of patches.
        source: What the orders are of and who made them; a file is only read for the same source.
    """

    def __init__(self, ranks: Tensor, grid: tuple[int, int], source: str):
        self.ranks, self.grid, self.source = ranks, tuple(grid), source

    @classmethod
    def build(
        cls,
        compute: Callable[[Tensor], Order],
        dataset: Dataset,
        transform: Callable,
        source: str,
        batch_size: int = 128,
        device: torch.device | str = "cpu",
        quiet: bool = False,
    ) -> OrderTable:
        """Order every image and its mirror image.

        Args:
            compute: Images (B, C, H, W) -> Order.
            dataset: (PIL image, label); `transform` makes tensors of the images, without randomness.
            source: See the class.
        """
        from tqdm.auto import tqdm

        loader = DataLoader(Indexed(dataset, transform), batch_size=batch_size)
        ranks: tuple[list, list] = ([], [])
        for images, _ in tqdm(loader, desc="orders of the data set", disable=quiet):
            for side, view in enumerate((images, images.flip(-1))):
                order = compute(view.to(device))
                dtype = torch.uint8 if order.num_patches <= 256 else torch.int32
                ranks[side].append(order.ranks.to("cpu", dtype))
        return cls(torch.stack([torch.cat(side) for side in ranks]), order.grid, source)

    def lookup(self, index: Tensor, mirrored: Tensor) -> Order:
        """The orders of samples `index` (B,) long, mirrored (B,) bool or not."""
        index, mirrored = index.cpu(), mirrored.cpu()
        return Order.from_ranks(self.ranks[mirrored.long(), index].long(), self.grid)

    def batches(self, labels: Tensor, mirrored: bool = True, size: int = 1024) -> Iterator[tuple[Order, Tensor]]:
        """The orders of the images, and then of their mirror images if wanted, with the labels (n,) of the images."""
        for side in self.ranks if mirrored else self.ranks[:1]:
            for ranks, part in zip(side.split(size), labels.split(size), strict=True):
                yield Order.from_ranks(ranks.long(), self.grid), part

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        grid = f"{self.grid[0]} {self.grid[1]}"
        save_file({"ranks": self.ranks}, path, metadata={"grid": grid, "source": self.source})

    @classmethod
    def load(cls, path: str | Path, source: str) -> OrderTable:
        """Read a file.

        Raises:
            CollapseError: It holds the orders of something else.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("source") != source:
                raise CollapseError(
                    f"order_table: {path} holds orders of {metadata.get('source')!r}, needed are those of {source!r}"
                )
            return cls(file.get_tensor("ranks"), tuple(int(n) for n in metadata["grid"].split()), source)
