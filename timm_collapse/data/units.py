"""Images of a data set in units of work: consecutive images, or tar files (see `tars`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.utils.data import Dataset

from ..order import CollapseError
from .base import Images
from .datasets import as_images, open_dataset
from .loader import ImageLoader
from .sources import joined_names
from .tars import TarUnits, tar_files


class MapUnits:
    """A map-style data set in units of consecutive images.

    Args:
        dataset: Map-style (PIL image, label), see `as_images`.
        shard_size: Images a unit, at least 1.

    Attributes:
        images: Number of images. unit: What a unit is, in words.
    """

    def __init__(self, dataset: Dataset, shard_size: int):
        self.dataset, self.shard_size, self.images = as_images(dataset), shard_size, len(dataset)
        self.unit = f"{shard_size} images"

    def __len__(self) -> int:
        return -(-self.images // self.shard_size)

    def range(self, unit: int) -> range:
        return range(unit * self.shard_size, min((unit + 1) * self.shard_size, self.images))

    def contents(self, unit: int) -> str:
        """What is in a unit, in words."""
        return f"images {self.range(unit).start} to {self.range(unit).stop - 1}"

    def size(self, unit: int) -> int | None:
        """Number of images of a unit; None where it is not known before they are read."""
        return len(self.range(unit))

    def batches(
        self, units: Sequence[int], transform: Callable, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[int, Tensor, Sequence[str], Tensor]]:
        """The images of the units, unit by unit; no batch holds images of two units.

        Args:
            units: Numbers of units.
            transform: PIL image -> (3, H, W).
            batch_size: Images a batch, fewer in the last one of a unit.
            workers: Processes that decode images.

        Yields:
            (unit, images (B, 3, H, W), the B keys, labels (B,) long, -1 where there is none).
        """
        indices, numbers = [], []
        for unit in units:
            images = self.range(unit)
            parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
            indices += parts
            numbers += [unit] * len(parts)
        loader = ImageLoader(_Keyed(self.dataset, transform), batch_sampler=indices, num_workers=workers)
        for unit, batch in zip(numbers, loader, strict=True):
            yield unit, *batch


class _Keyed(Dataset):
    """(tensor, key, label) of a data set."""

    def __init__(self, dataset: Images, transform: Callable):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, index: int) -> tuple[Tensor, str, int]:
        image, label = self.dataset[index]
        return self.transform(image), self.dataset.key(index), label


def open_units(name: str, split: str = "train", part: str = "", shard_size: int = 10_000) -> MapUnits | TarUnits:
    """Open a data set in units of work.

    Args:
        name: What `open_dataset` opens; or tar files, which are streamed: one, a folder of them, or a pattern such as
            "data/train-*.tar" or "wds/data/train-{0000..0146}.tar"; several of these joined by "+".
        split: See `open_dataset`; of a folder of tar files those in a folder, or with a name, of that split, if any is
            called so.
        part: See `open_dataset`.
        shard_size: Images a unit, at least 1.

    Raises:
        CollapseError: Nothing of that name or split, no images, or a part of tar files.
    """
    groups = [tar_files(each, split) for each in joined_names(name)]
    if all(groups):
        if part:
            raise CollapseError(
                f"part: must be empty for tar files, which are not numbered image by image, got {part!r}"
            )
        return TarUnits([file for group in groups for file in group])
    return MapUnits(open_dataset(name, split, part).dataset, shard_size)
