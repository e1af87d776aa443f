"""A folder of parquet files with the orders of a whole data set, written by any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from ..models.transformer import use_plain_attention
from ..order import CollapseError, Order
from .shards import Shards, differences, write_shards
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
    shards = _shards(folder)
    if shards.folder.exists() and not shards.folder.is_dir():
        raise CollapseError(_no_folder(shards.folder))
    if source["grid"][0] * source["grid"][1] > MAX_PATCHES:
        raise CollapseError(f"grid: must have at most {MAX_PATCHES} patches, got {source['grid']}")
    layout = _layout(source, units, mirrored, precision)
    for found in shards.layouts().values():
        check_layout(shards.folder, found, layout)
    if torch.device(device).type == "cpu":
        use_plain_attention(orderer)
    files, generator = shards.files(len(units)), getattr(orderer, "generator", None)
    seed, current = generator.initial_seed() if generator is not None else 0, None

    def encode(unit: int, images: Tensor) -> list[Tensor]:
        nonlocal current
        if unit != current and generator is not None:
            generator.manual_seed((seed * 1_000_003 + unit) % 2**63)
        current = unit
        images = images.to(device, non_blocking=True)
        views = (images, images.flip(-1)) if mirrored else (images,)
        return [_compact(compute(view)) for view in views]

    def save(file: Path, unit: int, keys: list[str], labels: Tensor, sides: list[Tensor]) -> None:
        columns = {"key": pa.array(keys, pa.string()), "label": pa.array(labels.numpy(), pa.int32())}
        for name, ranks in zip(("ranks", "ranks_mirrored"), sides):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(ranks.numpy().ravel()), ranks.shape[1])
        said = {**layout, "contents": units.contents(unit), "rows": len(keys)}
        table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(said)})
        pq.write_table(table, file, compression="zstd", row_group_size=16_384, write_page_checksum=True)

    try:
        write_shards(
            files, units, lambda unit: _whole(files[unit], units.contents(unit), units.size(unit)), encode, save,
            transform, batch_size, workers, rank, world, quiet, "orders",
        )  # fmt: skip
    finally:
        if generator is not None:
            generator.manual_seed(seed)


def _compact(order: Order) -> Tensor:
    """Ranks in the smallest type."""
    return order.ranks.cpu().to(torch.uint8 if order.num_patches <= 256 else torch.uint16)


def _layout(source: Mapping[str, Any], units, mirrored: bool, precision: str) -> dict[str, Any]:
    from .. import __version__

    layout = {**source, "mirrored": mirrored, "precision": precision, "unit": units.unit, "files": len(units)}
    return json.loads(json.dumps({**layout, "version": __version__}))  # as it is read again: tuples become lists


def _shards(folder: str | Path) -> Shards:
    return Shards(folder, "orders", "parquet", read_layout, "order_table", AGAIN)


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
    shards = _shards(folder)
    if not shards.found():
        raise CollapseError(_no_folder(shards.folder))
    layout, files = shards.whole()
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
        f"{name} is {other!r}, not {value!r}"
        for name, (other, value) in differences(found, wanted).items()
        if name not in ("version", "contents", "rows")
    ]
    if differ:
        raise CollapseError(f"order_table: {folder} holds other orders: {', '.join(differ)}; choose another folder")


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


def _no_folder(path: str | Path) -> str:
    return (
        f"order_table: {path} is no folder of orders; make it again with `timm-collapse order-dataset`"
        if Path(path).exists()
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
    _shards(folder).remove_temporary()
    return Checked(len(keys), different, len(files), repeated)
