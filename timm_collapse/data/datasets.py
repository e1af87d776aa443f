"""Data sets by name: the embedded digits, local parquet folders, and whatever timm's create_dataset opens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..order import CollapseError

TRAIN_NAMES, VALIDATION_NAMES = ("train", "training"), ("validation", "val", "valid", "test")


class DatasetInfo(NamedTuple):
    """A map-style data set of (PIL image, label) and the number of its classes (0: unknown)."""

    dataset: Dataset
    num_classes: int


class ParquetImages(Dataset):
    """Images and labels of Hugging Face parquet files, kept encoded in memory and decoded on access."""

    def __init__(self, files: list[Path]):
        import pyarrow.parquet as pq

        self.blobs, labels = [], []
        for file in files:
            table = pq.read_table(file)
            image_column = next((c for c in ("image", "img") if c in table.column_names), None)
            if image_column is None:
                raise CollapseError(f"dataset: {file} has no column 'image' or 'img', only {table.column_names}")
            self.blobs += [row["bytes"] for row in table.column(image_column).to_pylist()]
            label_column = next((c for c in ("label", "labels", "fine_label") if c in table.column_names), None)
            labels += table.column(label_column).to_pylist() if label_column else [0] * table.num_rows
        self.labels = np.asarray(labels)

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.blobs[index])).convert("RGB"), int(self.labels[index])


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8, 16 grey levels), every fifth one for validation."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        data = load_digits()
        validation = np.arange(len(data.images)) % 5 == 0
        chosen = validation if split in VALIDATION_NAMES else ~validation
        self.images = (data.images[chosen] * 15.9).astype(np.uint8)
        self.labels = data.target[chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


class Subset(Dataset):
    """Every sample whose index modulo `parts` is (not) `part`: disjoint halves for judges and contestants."""

    def __init__(self, dataset: Dataset, part: int, parts: int, exclude: bool = False):
        self.dataset = dataset
        index = np.arange(len(dataset))
        self.index = index[(index % parts != part) if exclude else (index % parts == part)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int):
        return self.dataset[int(self.index[index])]


def labels_of(dataset: Dataset) -> np.ndarray:
    """(n,) the labels of a map-style data set, without decoding its images where that can be saved."""
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[dataset.index]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return np.concatenate([labels_of(each) for each in dataset.datasets])
    labels = None
    if getattr(dataset, "target_transform", None) is None:
        labels = _listed_labels(dataset)
    return np.asarray([dataset[i][1] for i in range(len(dataset))] if labels is None else labels)


def _listed_labels(dataset: Dataset):
    """The labels that a data set, or timm's reader of it, has beside its images; None where it has none."""
    reader = getattr(dataset, "reader", None)
    if hasattr(reader, "iter_targets"):  # hfds
        return list(reader.iter_targets())
    for holder, name in ((dataset, "labels"), (dataset, "targets"), (reader, "targets")):  # ours, torchvision, tar
        if (labels := getattr(holder, name, None)) is not None:
            return labels
    samples = getattr(reader, "samples", None)  # image folder: (path, label)
    return None if samples is None else [label for _, label in samples]


def open_dataset(name: str, split: str = "train", part: str = "") -> DatasetInfo:
    """Open a data set.

    Args:
        name: "digits"; a folder of parquet files named `<split>-*.parquet`; several of these joined by "+"; or any name
            that `timm.data.create_dataset` knows ("hfds/...", "wds/...", "torch/...", an image folder).
        split: "train" or "validation" (also found as val or test).
        part: "i/n" takes the samples with index = i modulo n, "!i/n" all the others; empty takes all.

    Raises:
        CollapseError: Nothing of that name or split.
    """
    if "+" in name:
        opened = [open_dataset(each, split, part) for each in name.split("+")]
        joined = torch.utils.data.ConcatDataset([o.dataset for o in opened])
        return DatasetInfo(joined, max(o.num_classes for o in opened))
    names = next((group for group in (TRAIN_NAMES, VALIDATION_NAMES) if split in group), (split,))
    if name == "digits":
        if split not in TRAIN_NAMES + VALIDATION_NAMES:
            raise CollapseError(f"split: digits has train and validation, got {split!r}")
        info = DatasetInfo(Digits(split), 10)
    elif Path(name).is_dir() and (found := sorted(Path(name).glob("**/*.parquet"))):
        groups = ([f for f in found if f.name.startswith(n)] for n in sorted(names, key=lambda n: n != split))
        files = next((group for group in groups if group), [])
        if not files:
            raise CollapseError(f"split: {name} has no parquet file of split {split!r}, only {[f.name for f in found]}")
        dataset = ParquetImages(files)
        info = DatasetInfo(dataset, int(dataset.labels.max()) + 1)
    else:
        info = _open_timm(name, split, names)
    if part:
        numbers = part.removeprefix("!").split("/")
        if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
            raise CollapseError(f"part: expected 'i/n' or '!i/n' with i < n, got {part!r}")
        subset = Subset(info.dataset, int(numbers[0]), int(numbers[1]), exclude=part.startswith("!"))
        info = DatasetInfo(subset, info.num_classes)
    return info


def _open_timm(name: str, split: str, synonyms: tuple[str, ...]) -> DatasetInfo:
    from timm.data import create_dataset

    root = name if Path(name).exists() else None
    if root is None and "/" not in name:
        raise CollapseError(f"dataset: {name!r} is neither 'digits', a folder, nor a timm data set such as hfds/<id>")
    folders = {p.name for p in Path(root).iterdir() if p.is_dir()} if root and Path(root).is_dir() else set()
    if folders & set(TRAIN_NAMES + VALIDATION_NAMES) and not folders & set(synonyms):
        raise CollapseError(f"split: {name} has no folder of split {split!r}, only {sorted(folders)}")
    try:
        dataset = create_dataset("" if root else name, root=root, split=split)
    except (AssertionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise CollapseError(f"dataset: {name!r} could not be opened: {error}") from error
    if not hasattr(dataset, "__getitem__"):
        raise CollapseError(f"dataset: {name!r} can only be streamed; training needs a data set with random access")
    classes = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return DatasetInfo(dataset, len(classes))
