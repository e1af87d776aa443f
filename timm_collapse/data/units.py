"""Images of a data set in units of work: consecutive images, or tar files (see `tars`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..order import CollapseError
from .datasets import Subset, open_dataset
from .tars import TarUnits, split_name, tar_files


class MapUnits:
    """A map-style data set in units of consecutive images.

    Args:
        dataset: (PIL image, label).
        shard_size: Images a unit, at least 1.

    Attributes:
        images: Number of images. unit: What a unit is, in words.
    """

    def __init__(self, dataset: Dataset, shard_size: int):
        self.dataset, self.shard_size, self.images = dataset, shard_size, len(dataset)
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
        loader = DataLoader(
            _Keyed(self.dataset, transform), batch_sampler=indices, num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        for unit, batch in zip(numbers, loader, strict=True):
            yield unit, *batch


class _Keyed(Dataset):
    """(tensor, key, label) of a map-style data set."""

    def __init__(self, dataset: Dataset, transform: Callable):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, index: int) -> tuple[Tensor, str, int]:
        image, label = read_sample(self.dataset, index)
        try:
            label = int(label)
        except (TypeError, ValueError):
            label = -1  # none, or several
        return self.transform(image), key_of(self.dataset, index), label


def read_sample(dataset: Dataset, index: int) -> tuple[Image.Image, object]:
    """(RGB image, label) at an index; timm's data sets would give another image in the place of one that is unreadable.

    Raises:
        CollapseError: The image cannot be decoded.
    """
    if isinstance(dataset, Subset):
        return read_sample(dataset.dataset, int(dataset.index[index]))
    reader = getattr(dataset, "reader", None)
    if reader is None:
        image, label = dataset[index]
        return image.convert("RGB"), label
    try:
        image, label = reader[index]
        image = image if isinstance(image, Image.Image) else Image.open(image)
        return image.convert("RGB"), label  # decodes it
    except Exception as error:  # Pillow's, the system's, and those of whatever reader it is
        raise CollapseError(f"dataset: the image {key_of(dataset, index)!r} cannot be decoded: {error}") from error


def key_of(dataset: Dataset, index: int) -> str:
    """What names the image at an index, also where only a part of the data set is taken.

    The relative path in an image folder, the member's name without suffix in a tar file, else the index as text.
    """
    from timm.data.readers.reader_image_folder import ReaderImageFolder
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    if isinstance(dataset, Subset):
        return key_of(dataset.dataset, int(dataset.index[index]))
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        return Path(reader.filename(index)).as_posix()
    if isinstance(reader, ReaderImageInTar):
        return split_name(reader.filename(index))[0]
    return str(index)


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
    groups = [tar_files(each, split) for each in name.split("+")]
    if all(groups):
        if part:
            raise CollapseError(
                f"part: must be empty for tar files, which are not numbered image by image, got {part!r}"
            )
        return TarUnits([file for group in groups for file in group])
    dataset = open_dataset(name, split, part).dataset
    if not len(dataset):
        raise CollapseError(f"dataset: {name!r} has no images of split {split!r}, part {part!r}")
    return MapUnits(dataset, shard_size)


def describe_dataset(name: str, split: str, part: str = "") -> str:
    """A data set in words that stay the same where its folder is moved."""
    names = "+".join(Path(each).name for each in name.split("+"))
    return " ".join(filter(None, (names, split, part)))
