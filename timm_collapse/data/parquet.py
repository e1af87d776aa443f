"""Images in Hugging Face's parquet files, read row by row: of any size, with little memory."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..order import CollapseError
from .base import UNKNOWN, Images
from .columns import features_of, image_bytes, image_column, label_column
from .files import remove_old, write_whole

HELD_BYTES = 64 * 2**20  # of encoded images that a process holds
PASSES = 3  # jumps back that may still be passes from front to back
BUFFER = 2**20  # bytes read at once where a row group is unpacked


class RowGroup(NamedTuple):
    """Where some consecutive images lie: the number of the group in its file, rows, bytes of its images."""

    file: Path
    number: int
    rows: int
    size: int
    column: str


class ParquetImages(Images):
    """Images and labels of parquet files, decoded on access.

    Parquet can only be read a row group at a time, hundreds to thousands of images. Read from front to back, each group
    is held until the next one is needed. Once a process has jumped back a few times, as in training, it unpacks the
    groups that it comes upon into files of `cache_folder()`, once for all processes and runs, where every image can be
    read by itself; so it does with groups of more than 64 MB. Data sets of up to 64 MB are held and never unpacked.

    It can be pickled, and read by forked processes.

    Args:
        files: With the same columns, in order.
        name: In error messages.

    Raises:
        CollapseError: A file is damaged, has no column of images, or other class names than the first one.
    """

    def __init__(self, files: list[Path], name: str):
        self.name = name
        self.groups: list[RowGroup] = []
        labels, classes = [], []
        for file in files:
            try:
                with pq.ParquetFile(file) as opened:
                    features = features_of(opened.schema_arrow)
                    column = image_column(features, file)
                    label, names, why = label_column(features)
                    self.groups += _row_groups(file, opened.metadata, column)
                    labels.append(_labels(opened, label))
            except (OSError, pa.ArrowException) as error:
                raise CollapseError(f"dataset: {file} is damaged or no parquet file: {error}") from error
            classes.append(names)
            self.why_unlabelled = why or self.why_unlabelled
        if any(names != classes[0] for names in classes):
            raise CollapseError(f"dataset: the parquet files of {name} have different class names; open them apart")
        self.labels, self.class_to_idx = np.concatenate(labels), classes[0]
        self.num_classes = len(classes[0]) or int(self.labels.max(initial=UNKNOWN)) + 1
        self._starts = np.cumsum([0, *(group.rows for group in self.groups)])
        self._small = sum(group.size for group in self.groups) <= HELD_BYTES
        self._held: OrderedDict[int, pa.Array] = OrderedDict()
        self._last, self._jumps = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    def read(self, index: int) -> bytes:
        """See `Images.read`."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        group, row = self.groups[number], index - int(self._starts[number])
        if number not in self._held:
            self._jumps += number < self._last
            self._last = number
            if not self._small and (self._jumps > PASSES or group.size > HELD_BYTES):
                return _read_unpacked(group, row)
            self._hold(number)
        self._held.move_to_end(number)
        return image_bytes(self._held[number][row].as_py(), group.file.parent)

    def _hold(self, number: int) -> None:
        group = self.groups[number]
        while self._held and sum(self.groups[n].size for n in self._held) + group.size > HELD_BYTES:
            self._held.popitem(last=False)
        with pq.ParquetFile(group.file) as opened:
            column = opened.read_row_group(group.number, [group.column], use_threads=False).column(0)
        self._held[number] = column.combine_chunks()


def cache_folder() -> Path:
    """Where images are unpacked: TIMM_COLLAPSE_CACHE, else the user's cache folder. It can be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TIMM_COLLAPSE_CACHE") or Path(home) / "timm_collapse")


def _row_groups(file: Path, metadata: pq.FileMetaData, column: str) -> Iterator[RowGroup]:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        leaves = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in leaves if c.path_in_schema.split(".")[0] == column)
        yield RowGroup(file, number, group.num_rows, size, column)


def _labels(opened: pq.ParquetFile, column: str | None) -> np.ndarray:
    if column is None:
        return np.full(opened.metadata.num_rows, UNKNOWN)
    return opened.read([column], use_threads=False)[column].cast(pa.int64()).fill_null(UNKNOWN).to_numpy()


def _read_unpacked(group: RowGroup, row: int) -> bytes:
    """One image of a group, which is unpacked if need be: n + 1 offsets as 8-byte integers, then the images."""
    stat = group.file.stat()
    identity = f"{group.file.resolve()} {stat.st_size} {stat.st_mtime_ns} {group.column}"
    folder = cache_folder() / "parquet" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    file = folder / f"{group.number:05d}.images"
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            remove_old(folder)
            write_whole(file, lambda temporary: _unpack(group, temporary))
        with open(file, "rb") as opened:
            opened.seek(8 * row)
            start, end = np.frombuffer(opened.read(16), np.int64).tolist()
            opened.seek(start)
            return opened.read(end - start)
    except OSError as error:
        raise CollapseError(
            f"dataset: the images of {group.file.name} cannot be unpacked into {folder}: {error.strerror or error}; "
            "TIMM_COLLAPSE_CACHE names another folder for them"
        ) from error


def _unpack(group: RowGroup, target: Path) -> None:
    offsets = np.empty(group.rows + 1, np.int64)
    with pq.ParquetFile(group.file, buffer_size=BUFFER) as opened, open(target, "wb") as out:
        offsets[0] = out.seek(offsets.nbytes)
        batches = opened.iter_batches(64, [group.number], [group.column], use_threads=False)
        for row, cell in enumerate(cell for batch in batches for cell in batch.column(0)):
            try:
                image = image_bytes(cell.as_py(), group.file.parent)
            except (OSError, ValueError):
                image = b""  # found missing when it is asked for
            offsets[row + 1] = offsets[row] + out.write(image)
        out.seek(0)
        offsets.tofile(out)
