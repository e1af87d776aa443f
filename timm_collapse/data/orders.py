"""Orders of a whole data set, read from a folder: for training with no other augmentation than mirroring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..order import CollapseError, Order
from .base import Images
from .datasets import as_images
from .order_shards import AGAIN, check_layout, read_folder, read_layout, read_shard

COMPARED_KEYS = 1000  # of a table and its data set


class OrderTable:
    """Ranks of the patches of every image of a data set, and of its mirror image.

    Args:
        ranks: (1 or 2, n, N) uint8 or, where N > 256, uint16: the images, then their mirror images.
        labels: (n,) of the images, -1 where there is none.
        layout: What the folder says: dataset, images, img_size, grid, orderer, weights, mirrored ...

    Attributes:
        grid: Rows and columns of patches. source: What the orders are of and who made them, in words.
    """

    def __init__(self, ranks: Tensor, labels: Tensor, layout: Mapping[str, Any]):
        self.ranks, self.labels, self.layout = ranks, labels, layout
        self.grid: tuple[int, int] = tuple(layout["grid"])
        size = " x ".join(map(str, layout["img_size"]))
        self.source = f"{layout['dataset']}, {len(self)} images of {size} pixels, by {layout['orderer']}"
        self.source += f" ({layout['weights']})"

    @classmethod
    def load(
        cls,
        folder: str | Path,
        source: Mapping[str, Any] | None = None,
        dataset: Dataset | None = None,
        quiet: bool = False,
    ) -> OrderTable:
        """Read a folder that `write_orders` wrote.

        Args:
            folder: With all its files.
            source: What the orders have to be of, see `engine.order_source`; "mirrored" may be among it. None takes
                the folder's word.
            dataset: The map-style data set whose indices are looked up.
            quiet: No progress bar.

        Raises:
            CollapseError: No folder of orders, one of another source or data set, or missing or damaged files.
        """
        from tqdm.auto import tqdm

        layout, files = read_folder(folder)
        stream = _STREAM if layout["images"] is None else ""
        if source is not None:
            wanted = json.loads(json.dumps(dict(source)))  # as the layout was read: tuples become lists
            if stream:
                wanted.pop("images", None)  # of a stream; the length is compared below
            check_layout(folder, layout, wanted)
        rows = [read_layout(file)["rows"] for file in files]
        dataset = None if dataset is None else as_images(dataset)
        if dataset is not None and len(dataset) != sum(rows):
            raise CollapseError(
                f"order_table: {folder} has the orders of {sum(rows)} images, the data set has {len(dataset)}{stream}"
            )
        patches, sides = layout["grid"][0] * layout["grid"][1], 1 + layout["mirrored"]
        ranks = np.empty((sides, sum(rows), patches), np.uint8 if patches <= 256 else np.uint16)
        labels, start = np.empty(sum(rows), np.int32), 0
        for file, count in zip(tqdm(files, "reading orders", delay=2, disable=quiet), rows, strict=True):
            shard, place = read_shard(file), slice(start, start + count)
            if shard.num_rows != count:
                raise CollapseError(f"order_table: {file} has {shard.num_rows} of {count} rows; delete it and {AGAIN}")
            labels[place] = shard["label"].to_numpy()
            for side, name in enumerate(("ranks", "ranks_mirrored")[:sides]):
                ranks[side, place] = shard[name].combine_chunks().flatten().to_numpy().reshape(count, patches)
            if dataset is not None:
                _compare_keys(shard["key"], start, dataset, every=-(-sum(rows) // COMPARED_KEYS), stream=stream)
            start += count
        return cls(torch.from_numpy(ranks), torch.from_numpy(labels), layout)

    def __len__(self) -> int:
        return self.ranks.shape[1]

    def lookup(self, index: Tensor, mirrored: Tensor) -> Order:
        """The orders of samples `index` (B,) long, mirrored (B,) bool or not.

        Raises:
            CollapseError: Mirror images are asked for, and the folder has none.
        """
        index, mirrored = index.cpu(), mirrored.cpu()
        if len(self.ranks) == 1 and mirrored.any():
            raise CollapseError(_NOT_MIRRORED)
        return Order.from_ranks(_long(self.ranks[mirrored.long(), index]), self.grid)

    def batches(self, labels: Tensor, mirrored: bool = True, size: int = 1024) -> Iterator[tuple[Order, Tensor]]:
        """The orders of the images, and then of their mirror images if wanted, with the labels (n,) of the images.

        Raises:
            CollapseError: Mirror images are asked for, and the folder has none.
        """
        if len(self.ranks) == 1 and mirrored:
            raise CollapseError(_NOT_MIRRORED)
        for side in self.ranks if mirrored else self.ranks[:1]:
            for ranks, part in zip(side.split(size), labels.split(size), strict=True):
                yield Order.from_ranks(_long(ranks), self.grid), part


_NOT_MIRRORED = "order_table: has no orders of mirror images; make it again with --mirror"
_STREAM = "; it has the images of a stream of tar files in their sequence there, not by the index of a data set"


def _compare_keys(keys: Any, start: int, dataset: Images, every: int, stream: str) -> None:
    """Compares some keys of a file, whose rows are numbered from `start`, with those of a data set."""
    for row in range(-start % every, len(keys), every):
        found, key = keys[row].as_py(), dataset.key(start + row)
        if found != key:
            raise CollapseError(
                f"order_table: has the order of {found!r} at index {start + row}, where the data set has "
                f"{key!r}{stream}"
            )


def _long(ranks: Tensor) -> Tensor:
    """Long ranks; by way of int16, as few operations know uint16."""
    return ranks.view(torch.int16).long() & 0xFFFF if ranks.dtype == torch.uint16 else ranks.long()
