"""Data sets by name: the embedded digits, parquet files, image folders, tar files, `datasets`; "+" joins them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ..order import CollapseError
from .base import Chosen, Foreign, Images, Joined
from .parquet import ParquetImages
from .readers import HfImages, TimmImages, open_folder
from .sources import TRAIN_NAMES, VALIDATION_NAMES, joined_names, split_synonyms


class DatasetInfo(NamedTuple):
    """A data set and the number of its classes (0: unknown)."""

    dataset: Images
    num_classes: int


class Digits(Images):
    """scikit-learn's 1,797 handwritten digits (8 x 8, 16 grey levels), every fifth one for validation."""

    name, num_classes = "digits", 10

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        data = load_digits()
        validation = np.arange(len(data.images)) % 5 == 0
        chosen = validation if split in VALIDATION_NAMES else ~validation
        self.images = (data.images[chosen] * 15.9).astype(np.uint8)
        self.labels = data.target[chosen]

    def image(self, index: int) -> Image.Image:
        """See `Images.image`."""
        return Image.fromarray(self.images[index]).convert("RGB")


def as_images(dataset: Dataset) -> Images:
    """A map-style data set of (PIL image, label), such as timm's or torchvision's, with the interface of this module.

    timm's own data sets would give another image in the place of one that is unreadable; here that is an error.
    """
    if isinstance(dataset, Images):
        return dataset
    if isinstance(dataset, torch.utils.data.Subset):
        return Chosen(as_images(dataset.dataset), np.asarray(dataset.indices, np.int64))
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return Joined([as_images(each) for each in dataset.datasets])
    if isinstance(dataset, ImageDataset) and dataset.target_transform is None:
        return TimmImages(dataset.reader)
    return Foreign(dataset)


def labels_of(dataset: Dataset) -> np.ndarray:
    """(n,) int64, the labels of a map-style data set, without decoding its images where that can be saved.

    An image without a label, or with several, has -1.
    """
    return as_images(dataset).labels


def open_dataset(name: str, split: str = "train", part: str = "", labelled: bool = False) -> DatasetInfo:
    """Open a data set.

    Every image is decoded as `timm-collapse order` does it (`decode_image`). One that cannot be read or decoded is an
    error that names it, in every command: none is skipped, and none takes the place of another.

    Args:
        name: "digits"; a folder of Hugging Face parquet files named `<split>-*.parquet`; an image folder, with a folder
            for each split or without; a tar file of images; "hfds/<id>", which needs `datasets`; or several of these
            joined by "+". A path may have a "+" in it.
        split: "train" or "validation" (also found as val or test), or what the data set calls it.
        part: "i/n" takes the samples with index = i modulo n, "!i/n" all the others; empty takes all.
        labelled: Every image must have a label.

    Raises:
        CollapseError: Nothing of that name, split or part, no images, or no labels where they are needed.
    """
    datasets = [_part(_open(each, split), part) for each in joined_names(name)]
    dataset = datasets[0] if len(datasets) == 1 else Joined(datasets)
    if not len(dataset):
        raise CollapseError(
            f"dataset: {name!r} has no images of split {split!r}" + (f", part {part!r}" if part else "")
        )
    if labelled and (dataset.labels < 0).any():
        raise CollapseError(f"dataset: {name!r} has no labels, which are needed here: {dataset.why_unlabelled}")
    return DatasetInfo(dataset, dataset.num_classes)


def _part(dataset: Images, part: str) -> Images:
    if not part:
        return dataset
    numbers = part.removeprefix("!").split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise CollapseError(f"part: expected 'i/n' or '!i/n' with i < n, got {part!r}")
    index, (i, n) = np.arange(len(dataset)), map(int, numbers)
    return Chosen(dataset, index[(index % n != i) if part.startswith("!") else (index % n == i)])


def _open(name: str, split: str) -> Images:
    kind = name.split("/")[0].lower() if not Path(name).exists() else ""
    if name == "digits":
        if split not in TRAIN_NAMES + VALIDATION_NAMES:
            raise CollapseError(f"split: digits has train and validation, got {split!r}")
        return Digits(split)
    if kind == "hfds":
        return HfImages(name, split)
    if kind in ("wds", "hfids", "tfds"):
        raise CollapseError(f"dataset: {name!r} can only be streamed; here a data set with random access is needed")
    if kind == "torch":
        raise CollapseError(
            f"dataset: {name!r}: torchvision's data sets have no names here; give a folder of its images, or hfds/<id>"
        )
    if not name.strip() or not Path(name).exists():
        raise CollapseError(
            f"dataset: {name!r} is neither 'digits', a folder or tar file that exists, nor hfds/<id>; '+' joins several"
        )
    try:
        if Path(name).is_dir() and (found := sorted(Path(name).glob("**/*.parquet"))):
            return ParquetImages(_of_split(name, found, split), name)
        return open_folder(name, split)
    except OSError as error:
        raise CollapseError(f"dataset: {name!r} could not be opened: {error}") from error


def _of_split(name: str, found: list[Path], split: str) -> list[Path]:
    """The parquet files whose names begin with the split, or that lie in a folder of that name."""
    for synonym in split_synonyms(split):
        inside = ((file, file.relative_to(name)) for file in found)
        files = [file for file, path in inside if path.name.startswith(synonym) or synonym in path.parts[:-1]]
        if files:
            return files
    raise CollapseError(
        f"split: {name} has no parquet file of split {split!r}, only {', '.join(file.name for file in found[:8])}"
    )
