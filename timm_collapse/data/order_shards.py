"""A folder of parquet files with the orders of a whole data set, written by any number of processes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from ..models.transformer import use_plain_attention
from ..order import CollapseError, Order
from .tars import TarUnits
from .units import MapUnits

METADATA = b"timm_collapse"
MAX_PATCHES = 65_536  # of a rank in uint16
AGAIN = "start `timm-collapse order-dataset` again with the same arguments to go on"


def write_orders(
    folder: str | Path,
    units: MapUnits | TarUnits,
    source: Mapping[str, Any],
    orderer: nn.Module,
    compute: Callable[[Tensor], Order],
    transform: Callable,
    mirrored: bool = True,
    precision: str = "no",
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    quiet: bool = False,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Writes those files of this process that are not yet in the folder, one a unit; nothing waits for a process.

    What is written depends neither on the number of processes nor on interruptions.

    Args:
        folder: Is made where it does not exist.
        units: The images.
        source: What is ordered and by whom, see `engine.order_source`.
        orderer: The module that orders. Where it has a `generator`, that is seeded anew for each unit.
        compute: Images (B, 3, H, W) on the device -> Order.
        transform: PIL image -> (3, H, W), without randomness.
        mirrored: Also order the mirror images.
        precision: Under which `compute` is called, in words.
        batch_size: Images a batch.
        workers: Processes that decode images.
        device: Of the orderer.
        quiet: No progress bar.
        rank, world: This process and the number of processes: it takes the units rank, rank + world, ...

    Raises:
        CollapseError: The folder holds other orders, the grid has too many patches, or the images cannot be read.
    """
    from tqdm.auto import tqdm

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CollapseError(_no_folder(folder))
    if source["grid"][0] * source["grid"][1] > MAX_PATCHES:
        raise CollapseError(f"grid: must have at most {MAX_PATCHES} patches, got {source['grid']}")
    layout = _layout(source, units, mirrored, precision)
    folder.mkdir(parents=True, exist_ok=True)
    _check_others(folder, layout)
    files = shard_files(folder, layout)
    own = list(range(rank, len(files), world))
    rows = {n: _whole(files[n], units.contents(n), units.size(n)) for n in tqdm(own, "files", delay=2, disable=quiet)}
    left = [n for n in own if rows[n] is None]
    sizes = [units.size(n) for n in own]
    if torch.device(device).type == "cpu":
        use_plain_attention(orderer)
    bar = tqdm(
        total=None if None in sizes else sum(sizes), initial=sum(filter(None, rows.values())), desc="orders",
        unit="image", disable=quiet, dynamic_ncols=True,
    )  # fmt: skip
    with bar, torch.no_grad():
        batches = units.batches(left, transform, batch_size, workers)
        for done, (unit, shard) in enumerate(_shards(batches, orderer, compute, mirrored, device, bar), 1):
            _write(files[unit], shard, {**layout, "contents": units.contents(unit), "rows": shard.num_rows})
            bar.set_postfix_str(f"file {len(own) - len(left) + done} of {len(own)}", refresh=False)


def _shards(batches: Iterable, orderer, compute, mirrored, device, bar):
    """(unit, table) of each unit of the batches, once it is whole."""
    generator = getattr(orderer, "generator", None)
    seed = generator.initial_seed() if generator is not None else 0
    current, keys, labels, sides = None, [], [], ([], [])

    def table() -> pa.Table:
        columns = {"key": pa.array(keys, pa.string()), "label": pa.array(torch.cat(labels).numpy(), pa.int32())}
        for name, ranks in zip(("ranks", "ranks_mirrored"), sides[: 1 + mirrored]):
            ranks = np.concatenate(ranks)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(ranks.ravel()), ranks.shape[1])
        return pa.table(columns)

    try:
        for unit, images, batch_keys, batch_labels in batches:
            if unit != current:
                if current is not None:
                    yield current, table()
                current, keys, labels, sides = unit, [], [], ([], [])
                if generator is not None:
                    generator.manual_seed((seed * 1_000_003 + unit) % 2**63)
            images = images.to(device, non_blocking=True)
            for side, view in zip(sides, (images, images.flip(-1)) if mirrored else (images,)):
                order = compute(view)
                side.append(order.ranks.cpu().numpy().astype(np.uint8 if order.num_patches <= 256 else np.uint16))
            keys += batch_keys
            labels.append(batch_labels)
            bar.update(len(batch_keys))
        if current is not None:
            yield current, table()
    finally:
        if generator is not None:
            generator.manual_seed(seed)


def _write(file: Path, shard: pa.Table, layout: dict[str, Any]) -> None:
    shard = shard.replace_schema_metadata({METADATA: json.dumps(layout)})
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    pq.write_table(shard, temporary, compression="zstd", row_group_size=16_384, write_page_checksum=True)
    with open(temporary, "rb+") as written:
        os.fsync(written.fileno())  # else a crash may leave the name of a file without its content
    os.replace(temporary, file)


def _layout(source: Mapping[str, Any], units, mirrored: bool, precision: str) -> dict[str, Any]:
    from .. import __version__

    layout = {**source, "mirrored": mirrored, "precision": precision, "unit": units.unit, "files": len(units)}
    return json.loads(json.dumps({**layout, "version": __version__}))  # as it is read again: tuples become lists


def shard_files(folder: Path, layout: Mapping[str, Any]) -> list[Path]:
    """The files that a folder holds when it is whole."""
    count = layout["files"]
    return [folder / f"orders-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def read_layout(file: Path) -> dict[str, Any]:
    """What a file says that it holds.

    Raises:
        CollapseError: It is damaged or no file of orders.
    """
    try:
        return json.loads((pq.read_schema(file).metadata or {})[METADATA])
    except (OSError, ValueError, KeyError) as error:  # ValueError: pyarrow's ArrowInvalid
        raise CollapseError(f"order_table: {file} is damaged or holds no orders; delete it and {AGAIN}") from error


def read_shard(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Columns of a file, their checksums compared.

    Raises:
        CollapseError: It is damaged.
    """
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            return opened.read(columns)
    except (OSError, ValueError) as error:
        raise CollapseError(f"order_table: {file} is damaged; delete it and {AGAIN}") from error


def read_folder(folder: str | Path) -> tuple[dict[str, Any], list[Path]]:
    """What a whole folder holds, and its files.

    Raises:
        CollapseError: It is no folder of orders, or lacks files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CollapseError(_no_folder(folder))
    found = sorted(folder.glob("orders-*.parquet"))
    if not found:
        raise CollapseError(_no_folder(folder))
    layout = read_layout(found[0])
    files = shard_files(folder, layout)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CollapseError(
            f"order_table: {folder} lacks {len(missing)} of {len(files)} files, the first {missing[0]}; {AGAIN}"
        )
    for file in files:
        check_layout(folder, read_layout(file), layout)
    return layout, files


def is_whole(folder: str | Path) -> bool:
    """Whether a folder of orders has all its files; a damaged one counts as missing."""
    try:
        read_folder(folder)
    except CollapseError:
        return False
    return True


def check_layout(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses orders that are not the wanted ones.

    Raises:
        CollapseError: Names all that differs.
    """
    differ = [
        f"{name} is {found.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value and name not in ("version", "contents", "rows")
    ]
    if differ:
        raise CollapseError(f"order_table: {folder} holds other orders: {', '.join(differ)}; choose another folder")


def _check_others(folder: Path, layout: Mapping[str, Any]) -> None:
    for file in sorted(folder.glob("orders-*.parquet")):
        try:
            found = read_layout(file)
        except CollapseError:
            continue  # damaged: written again
        check_layout(folder, found, layout)


def _whole(file: Path, contents: str, size: int | None) -> int | None:
    """Number of rows of a whole file of these contents; None for a missing or damaged one.

    Raises:
        CollapseError: It is of other contents.
    """
    try:
        layout, shard = read_layout(file), read_shard(file)
    except CollapseError:
        return None
    if layout["contents"] != contents:
        raise CollapseError(
            f"order_table: {file} holds the orders of {layout['contents']!r}, not {contents!r}; choose another folder"
        )
    return shard.num_rows if shard.num_rows == layout["rows"] == (size or layout["rows"]) else None


def _no_folder(path: Path) -> str:
    return (
        f"order_table: {path} is no folder of orders; make it again with `timm-collapse order-dataset`"
        if path.exists()
        else f"order_table: there is no folder {path}; make it with `timm-collapse order-dataset`"
    )


class Checked(NamedTuple):
    """What a whole folder of orders holds.

    Attributes:
        images: Number of rows. keys: Number of different keys. files: Number of files. repeated: A key that several
        rows have, or "".
    """

    images: int
    keys: int
    files: int
    repeated: str


def check_orders(folder: str | Path) -> Checked:
    """Counts images and keys of a whole folder, and removes what killed processes left.

    Raises:
        CollapseError: The folder is not whole; it has not one row an image; or images of a data set that is not
            streamed share a key. (In tar files, a key is unique only where their maker saw to that.)
    """
    layout, files = read_folder(folder)
    keys = pa.chunked_array([chunk for file in files for chunk in read_shard(file, ["key"])["key"].chunks], pa.string())
    for file, rows in ((file, read_layout(file)["rows"]) for file in files):
        if pq.read_metadata(file).num_rows != rows:
            raise CollapseError(f"order_table: {file} has not the {rows} rows of its unit; delete it and {AGAIN}")
    images = layout["images"]
    if images is not None and len(keys) != images:
        raise CollapseError(f"order_table: {folder} has {len(keys)} rows for {images} images; {AGAIN}")
    different, repeated = pc.count_distinct(keys).as_py(), ""
    if different != len(keys):
        counts = pc.value_counts(keys)
        repeated = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()].as_py()
        if images is not None:
            raise CollapseError(f"order_table: {folder} has the image {repeated!r} more than once")
    for left in Path(folder).glob("orders-*.tmp"):
        left.unlink(missing_ok=True)
    return Checked(len(keys), different, len(files), repeated)
