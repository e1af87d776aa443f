"""Tar files of images, in webdataset's layout or plain, read from front to back by Python's tarfile."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..order import CollapseError
from .images import decode_image
from .loader import ImageLoader
from .sources import TRAIN_NAMES, VALIDATION_NAMES, split_synonyms

TAR_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
"""Key and suffix of a tar member, as webdataset has them: the suffix begins at the first dot of the file name."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
"""Of several images under one key, the one whose suffix comes first here is taken."""


class TarUnits:
    """Tar files of images (key.jpg and, where there are labels, key.cls); each is a unit and read once, in order.

    Attributes: as those of `MapUnits`; `images` is None, as nobody knows before all is read.
    """

    unit, images = "1 tar file", None

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def contents(self, unit: int) -> str:
        """The name of a unit's tar file."""
        return self.files[unit].name

    def size(self, unit: int) -> int | None:
        """None, see `MapUnits.size`."""
        return None

    def batches(self, units: Sequence[int], transform: Callable, batch_size: int, workers: int = 0) -> Iterator[tuple]:
        """See `MapUnits.batches`; (unit, images, keys, labels).

        Raises:
            CollapseError: A tar file without images, one that is damaged, or an image or label that cannot be decoded.
        """
        stream = _TarStream([(unit, self.files[unit]) for unit in units], transform, batch_size)
        yield from ImageLoader(stream, batch_size=None, num_workers=workers)


class _TarStream(IterableDataset):
    """Batches of tar files in order; of several workers, each decodes every so many-th batch and skips the others."""

    def __init__(self, files: list[tuple[int, Path]], transform: Callable, batch_size: int):
        self.files, self.transform, self.batch_size = files, transform, batch_size

    def __iter__(self) -> Iterator[tuple]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = 0  # number of the file's first batch
        for unit, file in self.files:
            batch, count = [], 0
            wanted = lambda n, first=first: (first + n // self.batch_size) % workers == worker  # noqa: E731
            for count, sample in enumerate(read_tar(file, wanted), 1):
                if sample is not None:
                    batch.append((self.transform(decode(file, *sample)), sample[0], sample[2]))
                if batch and count % self.batch_size == 0:
                    yield _collate(unit, batch)
                    batch = []
            if batch:
                yield _collate(unit, batch)
            if not count:
                raise CollapseError(f"dataset: {file} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            first += -(-count // self.batch_size)


def _collate(unit: int, samples: list[tuple[Tensor, str, int]]) -> tuple:
    images, keys, labels = zip(*samples)
    return unit, torch.stack(images), list(keys), torch.tensor(labels)


def read_tar(file: Path, wanted: Callable[[int], bool]) -> Iterator[tuple[str, bytes, int] | None]:
    """The images of a tar file, in one pass from front to back.

    Args:
        file: The tar file; consecutive members with the same key are one sample.
        wanted: Number of an image in the file -> whether it is read.

    Yields:
        (key, encoded image, label or -1), or None for an image that is not wanted.

    Raises:
        CollapseError: The file is damaged, or a label is no integer.
    """
    number = 0
    try:
        with tarfile.open(file) as tar:
            members = ((member, *member_key(member.name)) for member in tar if member.isfile())
            for key, parts in groupby(members, key=lambda part: part[1]):
                read, found, unclear = wanted(number), {}, ""
                for member, _, suffix in parts:
                    if suffix in IMAGE_SUFFIXES or suffix == "cls":
                        found[suffix] = tar.extractfile(member).read() if read else b""
                    elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
                        unclear = member.name
                image = next((found[suffix] for suffix in IMAGE_SUFFIXES if suffix in found), None)
                if image is None and unclear:
                    raise CollapseError(
                        f"dataset: the file name {unclear!r} in {file} must have one dot: what follows the first one "
                        "tells the parts of a sample apart"
                    )
                if image is None:
                    continue
                yield (key, image, _label(file, key, found.get("cls"))) if read else None
                number += 1
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise CollapseError(f"dataset: {file} is damaged or no tar file: {str(error).splitlines()[0]}") from error


def decode(file: Path, key: str, image: bytes, label: int) -> Image.Image:
    """The image of a sample that `read_tar` gave."""
    return decode_image(image, f"dataset: the image {key!r} in {file} cannot be decoded: it")


def _label(file: Path, key: str, text: bytes | None) -> int:
    try:
        return -1 if text is None else int(text)
    except ValueError:
        raise CollapseError(f"dataset: the label of {key!r} in {file} must be an integer, got {text[:20]!r}") from None


def member_key(name: str) -> tuple[str, str]:
    """Key and suffix of a tar member; the whole name and no suffix where it has no dot."""
    match = TAR_NAME.fullmatch(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else (name, "")


def tar_files(name: str, split: str) -> list[Path]:
    """The tar files that a name stands for, see `open_units`; none where it is no name of a stream.

    Raises:
        CollapseError: A name of a stream without tar files, or without any of the split.
    """
    path = name.removeprefix("wds/")
    if path.endswith(".tar") and re.search(r"[*?\[{]", path):
        files = [Path(found) for each in _expand(path) for found in sorted(glob(each)) or [each]]
    elif Path(path).is_dir():
        names = split_synonyms(split)
        folder = next((Path(path) / n for n in names if (Path(path) / n).is_dir()), Path(path))
        found = sorted(folder.iterdir())
        files = [file for file in found if file.suffix == ".tar"]
        beside = any(file.is_dir() for file in found) or any(file.suffix == ".parquet" for file in found)
        if path == name and (beside or not files):
            return []  # of a folder of images, the archive may lie beside
        if files and folder == Path(path):
            files = _of_split(files, split, names)
    elif path != name or (path.endswith(".tar") and Path(path).is_file()):
        files = [Path(path)]
    else:
        return []
    if missing := [file for file in files if not file.is_file()]:
        raise CollapseError(f"dataset: {name!r} names the tar file {missing[0]}, which does not exist")
    if path != name and not files:
        raise CollapseError(f"dataset: {name!r} has no tar files")
    return files


def _of_split(files: list[Path], split: str, names: Sequence[str]) -> list[Path]:
    """The files that have the split in their names; all where no file has any split in its name."""
    words = {file: set(re.split("[^a-z]+", file.stem.lower())) for file in files}
    if not any(words[file] & {*TRAIN_NAMES, *VALIDATION_NAMES, *names} for file in files):
        return files
    found = next((group for n in names if (group := [file for file in files if n in words[file]])), [])
    if not found:
        raise CollapseError(
            f"split: {files[0].parent} has no tar file of split {split!r}, the first is {files[0].name}"
        )
    return found


def _expand(pattern: str) -> list[str]:
    """The names that a pattern with braces such as {000..146} stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    width, numbers = len(match[1]), range(int(match[1]), int(match[2]) + 1)
    return [
        each for n in numbers for each in _expand(f"{pattern[: match.start()]}{n:0{width}}{pattern[match.end() :]}")
    ]
