"""Generated images on disk: folders of files, and .npz files in ADM's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.images import load_photo
from ..order import CollapseError
from .feature_statistics import open_npz

SUFFIXES = (".png", ".jpg", ".jpeg")
NAMED = re.compile(r"\d+_(\d+)\.png")
"""<number>_<label>.png, as `timm-collapse generate --samples` names its files."""


class Samples(Dataset):
    """Images of a folder or of an .npz file, as a map-style data set of (PIL image, label).

    Attributes:
        size: (height, width) in pixels, the same for all.
        names: Names of the class folders, one an image; None for images that lie in none.
        labels: One int an image, -1 where it is not known.
    """

    def __init__(self, images: list[Path] | np.ndarray, size: tuple[int, int], names: list[str] | None = None):
        self.images, self.size, self.names = images, size, names
        self.labels = np.full(len(images), -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index]
        image = load_photo(image) if isinstance(image, Path) else Image.fromarray(image)
        return image, int(self.labels[index])

    def classes(self, class_to_idx: Mapping[str, int]) -> Tensor | None:
        """(N,) long, the classes that the images were asked for; None where they are not known for all.

        Args:
            class_to_idx: Of the real data set: folders are found by name in it, so that some classes may have no
                sample. Folders that are not all in it are taken as class numbers.
        """
        labels = self.labels
        if self.names is not None:
            known = class_to_idx if set(self.names) <= set(class_to_idx) else {}
            known = known or {name: int(name) for name in self.names if name.isdecimal()}
            labels = np.array([known.get(name, -1) for name in self.names])
        return torch.from_numpy(labels.astype(np.int64)) if (labels >= 0).all() else None


def open_samples(path: str) -> Samples:
    """The generated images; CollapseError where there are none, or of several sizes."""
    if Path(path).suffix == ".npz":
        samples = read_arrays(path)
        if samples is None:
            raise CollapseError(f"--samples: {path} holds no arr_0")
        return samples
    root = Path(path)
    if not root.is_dir():
        raise CollapseError(f"--samples must be a folder or an .npz file, got {path!r}")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise CollapseError(f"--samples: {path} holds no {', '.join(SUFFIXES)}")
    size = None
    for file in files:
        try:
            with Image.open(file) as image:  # the header alone
                found = (image.height, image.width)
        except OSError as error:
            raise CollapseError(f"--samples: {file} cannot be read: {error}") from error
        size = size or found
        if found != size:
            raise CollapseError(f"--samples must be of one size: {files[0]} has {size}, {file} has {found} pixels")
    folders = [file.relative_to(root).parts[:-1] for file in files]
    samples = Samples(files, size, [parts[0] for parts in folders] if all(folders) else None)
    named = [NAMED.fullmatch(file.name) for file in files]
    if not any(folders) and all(named):
        samples.labels = np.array([int(match[1]) for match in named])
    return samples


def read_arrays(path: str) -> Samples | None:
    """arr_0 and arr_1 of an .npz file; None without arr_0."""
    with open_npz(path) as data:
        images = data["arr_0"] if "arr_0" in data.files else None
        labels = data["arr_1"] if "arr_1" in data.files else None
    if images is None:
        return None
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise CollapseError(f"{path}: arr_0 must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    samples = Samples(images, images.shape[1:3])
    if labels is not None:
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise CollapseError(f"{path}: arr_1 must be ({len(images)},) integers, got {labels.shape} {labels.dtype}")
        samples.labels = labels
    return samples
