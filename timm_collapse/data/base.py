"""The one interface of data sets: upright RGB images, integer labels, a key for each image."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..order import CollapseError
from .images import decode_image

UNKNOWN = -1  # as a label


class Images(Dataset):
    """A map-style data set of (upright RGB image, label).

    A subclass sets `name` and `labels`, and reads an image's file in `read`. An image that cannot be read or decoded
    is an error that names it: no other image takes its place.

    Attributes:
        name: In error messages. labels: (n,) int64, -1 where there is none. num_classes: 0 where it is not known.
        class_to_idx: Label of each class name, empty where classes have no names.
        why_unlabelled: Why there are no labels, in words.
    """

    name: str
    labels: np.ndarray
    num_classes: int = 0
    class_to_idx: dict[str, int] = {}
    why_unlabelled: str = "not all of its images have a label"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        index = range(len(self))[index]
        return self.image(index), int(self.labels[index])

    def key(self, index: int) -> str:
        """What names the image at an index, also where only a part of the data set is taken."""
        return str(index)

    def image(self, index: int) -> Image.Image:
        """The decoded image at an index in [0, n).

        Raises:
            CollapseError: It cannot be read or decoded.
        """
        what = f"dataset: the image {self.key(index)!r} cannot be decoded: the file in {self.name}"
        try:
            data = self.read(index)
        except CollapseError:
            raise
        except Exception as error:  # the system's, and those of whatever reader it is
            raise CollapseError(f"{what} cannot be read: {str(error) or type(error).__name__}") from error
        return decode_image(data, what)

    def read(self, index: int) -> bytes:
        """The encoded image at an index in [0, n)."""
        raise NotImplementedError


class Chosen(Images):
    """Some images of a data set, by their indices there."""

    def __init__(self, dataset: Images, index: np.ndarray):
        self.dataset, self.index, self.name = dataset, index, dataset.name
        self.labels, self.num_classes = dataset.labels[index], dataset.num_classes
        self.class_to_idx, self.why_unlabelled = dataset.class_to_idx, dataset.why_unlabelled

    def key(self, index: int) -> str:
        """See `Images.key`: that in the whole data set."""
        return self.dataset.key(int(self.index[index]))

    def image(self, index: int) -> Image.Image:
        """See `Images.image`."""
        return self.dataset.image(int(self.index[index]))


class Joined(Images):
    """Several data sets, one behind the other."""

    def __init__(self, datasets: list[Images]):
        self.datasets = datasets
        self.name = "+".join(dataset.name for dataset in datasets)
        self.labels = np.concatenate([dataset.labels for dataset in datasets])
        self.num_classes = max(dataset.num_classes for dataset in datasets)
        self.why_unlabelled = next((d.why_unlabelled for d in datasets if (d.labels < 0).any()), self.why_unlabelled)
        self.ends = np.cumsum([len(dataset) for dataset in datasets])

    def image(self, index: int) -> Image.Image:
        """See `Images.image`."""
        number = int(np.searchsorted(self.ends, index, "right"))
        return self.datasets[number].image(index - int(self.ends[number - 1] if number else 0))


class Foreign(Images):
    """Any other map-style data set of (PIL image, label)."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.name = dataset, type(dataset).__name__
        self._labels: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Listed where the data set lists them, else read one by one."""
        if self._labels is None:
            listed = None if getattr(self.dataset, "target_transform", None) else self._listed()
            found = [self.dataset[i][1] for i in range(len(self))] if listed is None else listed
            self._labels = as_labels(found)
        return self._labels

    def _listed(self):
        candidates = (getattr(self.dataset, name, None) for name in ("labels", "targets"))
        return next((labels for labels in candidates if labels is not None), None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[range(len(self))[index]]
        return image.convert("RGB"), int(as_labels([label])[0])

    def image(self, index: int) -> Image.Image:
        """See `Images.image`; as the data set decodes it."""
        return self[index][0]


def as_labels(values) -> np.ndarray:
    """(n,) int64 of whatever labels a data set has: -1 for None, for several at once and for what is no integer."""
    array = np.asarray(values) if not isinstance(values, list) or all(map(_is_integer, values)) else None
    if array is not None and array.ndim == 1 and (np.issubdtype(array.dtype, np.integer) or not array.size):
        return array.astype(np.int64)
    return np.asarray([int(value) if _is_integer(value) else UNKNOWN for value in values], np.int64)


def _is_integer(value) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim == 0 and int(value) == value
    return isinstance(value, (int, np.integer))
