"""Folders of numbered files, each written whole or not at all, by any number of processes and jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..order import CollapseError
from .files import remove_old, write_whole
from .tars import TarUnits
from .units import MapUnits


class Shards:
    """The files KIND-00000-of-00012.SUFFIX of a folder; each says in its layout what all of them hold.

    Args:
        folder: May not be there yet.
        kind: What they hold, such as "latents".
        suffix: Of the files.
        read_layout: File -> layout; raises CollapseError where it is damaged.
        argument: That names the folder, in error messages.
        again: How to go on with a folder that is not whole, in words.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        suffix: str,
        read_layout: Callable[[Path], dict[str, Any]],
        argument: str,
        again: str,
    ):
        self.folder, self.kind, self.suffix = Path(folder), kind, suffix
        self.read_layout, self.argument, self.again = read_layout, argument, again

    def files(self, count: int) -> list[Path]:
        """The files of a whole folder."""
        return [self.folder / f"{self.kind}-{number:05d}-of-{count:05d}.{self.suffix}" for number in range(count)]

    def found(self) -> list[Path]:
        """The files that are there, sorted."""
        return sorted(self.folder.glob(f"{self.kind}-*-of-*.{self.suffix}"))

    def layouts(self) -> dict[Path, dict[str, Any]]:
        """What the files that are there say, but for the damaged ones."""
        layouts = {}
        for file in self.found():
            try:
                layouts[file] = self.read_layout(file)
            except CollapseError:
                continue
        return layouts

    def whole(self) -> tuple[dict[str, Any], list[Path]]:
        """What the first file says, and all files.

        Raises:
            CollapseError: There are none, some are missing, or the first one is damaged.
        """
        found = self.found()
        if not found:
            raise CollapseError(f"{self.argument}: {str(self.folder)!r} holds no {self.kind}; {self.again}")
        layout, files = self.read_layout(found[0]), self.files(int(found[0].stem.rpartition("-")[2]))
        if missing := [file.name for file in files if not file.is_file()]:
            raise CollapseError(
                f"{self.argument}: {self.folder} lacks {len(missing)} of {len(files)} files, the first {missing[0]}; "
                f"{self.again}"
            )
        return layout, files

    def remove_temporary(self) -> None:
        """Removes what killed processes left of a folder that is whole: what it was to become is there."""
        for left in self.folder.glob(f"{self.kind}-*.tmp"):
            left.unlink(missing_ok=True)


def write_shards(
    files: Sequence[Path],
    units: MapUnits | TarUnits,
    rows: Callable[[int], int | None],
    encode: Callable[[int, Tensor], Sequence[Tensor]],
    save: Callable[[Path, int, list[str], Tensor, list[Tensor]], None],
    transform: Callable,
    batch_size: int = 64,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    quiet: bool = False,
    title: str = "",
) -> None:
    """Writes those files of this process that are not there yet, one a unit; nothing waits for a process.

    Args:
        files: One a unit.
        units: The images.
        rows: Number of a unit -> rows of its file, None where that has to be written.
        encode: Number of a unit and a batch of its images -> what is kept of them, tensors (B, ...).
        save: Writes a file: its path for the time being, number of the unit, keys, labels (n,) and what `encode` gave,
            (n, ...) each.
        transform: PIL image -> tensor, without randomness.
        batch_size: Images a batch.
        workers: Processes that decode images.
        rank, world: This process and the number of processes: it takes the units rank, rank + world, ...
        quiet: No progress bar.
        title: Of the progress bar.
    """
    from tqdm.auto import tqdm

    files[0].parent.mkdir(parents=True, exist_ok=True)
    remove_old(files[0].parent)
    own = list(range(rank, len(files), world))
    known = {n: rows(n) for n in tqdm(own, "files", delay=2, disable=quiet)}
    left = [n for n in own if known[n] is None]
    sizes = [units.size(n) for n in own]
    bar = tqdm(
        total=None if None in sizes else sum(sizes), initial=sum(filter(None, known.values())), desc=title,
        unit="image", disable=quiet, dynamic_ncols=True,
    )  # fmt: skip

    def end(unit: int, keys: list[str], labels: list[Tensor], parts: list[Sequence[Tensor]]) -> None:
        columns = [torch.cat(column) for column in zip(*parts)]
        write_whole(files[unit], lambda temporary: save(temporary, unit, keys, torch.cat(labels), columns))
        bar.set_postfix_str(f"file {len(own) - len(left) + left.index(unit) + 1} of {len(own)}", refresh=False)

    current, keys, labels, parts = None, [], [], []
    with bar, torch.no_grad():
        for unit, images, batch_keys, batch_labels in units.batches(left, transform, batch_size, workers):
            if unit != current:
                if current is not None:
                    end(current, keys, labels, parts)
                current, keys, labels, parts = unit, [], [], []
            parts.append(encode(unit, images))
            keys += batch_keys
            labels.append(batch_labels)
            bar.update(len(batch_keys))
        if current is not None:
            end(current, keys, labels, parts)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> what is found and what is wanted, where a layout is not as it should be."""
    return {name: (found.get(name), value) for name, value in wanted.items() if found.get(name) != value}
