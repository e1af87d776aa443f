"""Names of data sets: what they stand for, and how a data set is called in words."""

from __future__ import annotations

from pathlib import Path

TRAIN_NAMES, VALIDATION_NAMES = ("train", "training"), ("validation", "val", "valid", "test")


def joined_names(name: str) -> list[str]:
    """The data sets that a name joins by "+"; a path that is there may have a "+" in its own name."""
    parts, names = name.split("+"), []
    while parts:
        longest = (n for n in range(len(parts), 1, -1) if Path("+".join(parts[:n])).exists())
        count = next(longest, 1)
        names.append("+".join(parts[:count]))
        parts = parts[count:]
    return names


def split_synonyms(split: str) -> list[str]:
    """The names under which a split is looked for, its own first."""
    names = next((group for group in (TRAIN_NAMES, VALIDATION_NAMES) if split in group), (split,))
    return sorted(names, key=lambda name: name != split)


def describe_dataset(name: str, split: str, part: str = "") -> str:
    """A data set in words that stay the same where its folder is moved: what latents, orders, banks say they are of."""
    names = "+".join(_called(each) for each in joined_names(name))
    return " ".join(filter(None, (names, split, part)))


def same_source(found: str, described: str, images: int) -> bool:
    """Whether what a folder says that it is of is a described data set.

    Latents made before both were described alike say it with the path of the data set, or with the number of images.
    """
    found = found.removesuffix(f" {images}")
    return found == described or found.endswith("/" + described)


def _called(name: str) -> str:
    return Path(name).name or Path(name).resolve().name
