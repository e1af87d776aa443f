"""Images that others' readers find: timm's of image folders and tar files, and Hugging Face's `datasets`."""

from __future__ import annotations

import tarfile
from pathlib import Path

from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from ..order import CollapseError
from .base import Images, as_labels
from .columns import features_of, image_bytes, image_column, label_column
from .sources import TRAIN_NAMES, VALIDATION_NAMES, split_synonyms
from .tars import member_key


class TimmImages(Images):
    """The images of one of timm's readers with random access, decoded as all others are.

    Args:
        reader: Index -> (open file of the encoded image, label).
    """

    def __init__(self, reader: Reader):
        self.reader, self.name = reader, str(getattr(reader, "root", type(reader).__name__))
        self.class_to_idx = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        self.num_classes = len(self.class_to_idx)
        self.labels = as_labels(_targets(reader))

    def key(self, index: int) -> str:
        """See `Images.key`: the relative path in an image folder, the member's name without suffix in a tar file."""
        if isinstance(self.reader, ReaderImageFolder):
            return Path(self.reader.filename(index)).as_posix()
        if isinstance(self.reader, ReaderImageInTar):
            return member_key(self.reader.filename(index))[0]
        return str(index)

    def read(self, index: int) -> bytes:
        """See `Images.read`."""
        file = self.reader[index][0]
        with file:
            return file.read()


def _targets(reader: Reader):
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    targets = getattr(reader, "targets", None)
    return [label for _, label in reader.samples] if targets is None else targets


class HfImages(Images):
    """A data set of the Hub, or anything else that `datasets.load_dataset` opens with random access.

    Args:
        name: "hfds/<id>".
        split: Looked for under its synonyms, too.

    Raises:
        CollapseError: `datasets` is not installed, or the data set cannot be opened or has no images.
    """

    def __init__(self, name: str, split: str):
        try:
            import datasets
        except ImportError as error:
            raise CollapseError(f"dataset: {name!r} needs `pip install datasets`") from error
        opened = self._load(datasets, name, split)
        features = features_of(opened.features.arrow_schema)
        self.name, self.column = name, image_column(features, name)
        self.dataset = opened.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        label, self.class_to_idx, self.why_unlabelled = label_column(features)
        self.num_classes = len(self.class_to_idx)
        self.labels = as_labels(opened.select_columns([label])[:][label] if label else [None] * len(opened))
        if not self.num_classes and len(self.labels):
            self.num_classes = int(self.labels.max()) + 1

    @staticmethod
    def _load(datasets, name: str, split: str):
        """The split under the first of its synonyms that there is."""
        for synonym in (synonyms := split_synonyms(split)):
            try:
                return datasets.load_dataset(name.split("/", 1)[1], split=synonym)
            except Exception as error:  # network, cache, loading: whatever `datasets` raises
                unknown = isinstance(error, ValueError) and "split" in str(error).lower()
                if not unknown or synonym == synonyms[-1]:
                    what = " ".join(str(error).split())
                    raise CollapseError(f"dataset: {name!r}, split {split!r} could not be opened: {what}") from error

    def read(self, index: int) -> bytes:
        """See `Images.read`."""
        return image_bytes(self.dataset[index][self.column])


def open_folder(name: str, split: str) -> TimmImages:
    """An image folder, whose folders are classes, or that has one such folder a split; or a tar file laid out so.

    Raises:
        CollapseError: No images, not of that split, or a damaged tar file.
    """
    root = Path(name)
    folders = {each.name for each in root.iterdir() if each.is_dir()} if root.is_dir() else set()
    found = next((each for each in split_synonyms(split) if each in folders), None)
    if found is None and folders & {*TRAIN_NAMES, *VALIDATION_NAMES}:
        raise CollapseError(f"split: {name} has no folder of split {split!r}, only {sorted(folders)}")
    try:
        if root.suffix == ".tar":
            # an open file that forked processes share would be read at each other's positions
            return TimmImages(ReaderImageInTar(str(root), cache_tarfiles=False))
        return TimmImages(ReaderImageFolder(str(root / found if found else root)))
    except (RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        what = "is damaged" if isinstance(error, tarfile.TarError) else "holds no images"
        raise CollapseError(f"dataset: {name!r} {what}: {error}") from error
