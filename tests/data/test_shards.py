"""The one writer of numbered files: what several processes, jobs and killed runs leave behind."""

import os
import re
import socket
import threading
import time

import pytest
import torch

from timm_collapse import CollapseOrder
from timm_collapse.data import LatentCache, check_orders, eval_transform, open_units, write_orders
from timm_collapse.data.files import OLD, remove_old, write_whole
from timm_collapse.data.shards import Shards, write_shards
from timm_collapse.engine import order_source
from timm_collapse.models import PixelCodec


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    file, seen = tmp_path / "a.bin", []

    def write(temporary):
        seen.append(temporary.name)
        temporary.write_bytes(b"new")
        assert not file.exists() or file.read_bytes() == b"new"

    def fails(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(file, fails)
    assert not list(tmp_path.iterdir())
    write_whole(file, write)
    write_whole(file, write)
    assert contents(tmp_path) == {"a.bin": b"new"}
    own = re.escape(f"a.bin.{socket.gethostname()}-{os.getpid()}-") + r"\w{8}\.tmp"
    assert all(re.fullmatch(own, name) for name in seen) and len(set(seen)) == 2


def test_two_writers_never_see_each_others_half(tmp_path):
    """The second one begins and ends while the first is in the middle."""

    def slow(temporary):
        temporary.write_bytes(b"aa")
        write_whole(tmp_path / "f", lambda other: other.write_bytes(b"bbbb"))
        assert temporary.read_bytes() == b"aa" and (tmp_path / "f").read_bytes() == b"bbbb"
        with open(temporary, "ab") as rest:
            rest.write(b"aa")

    write_whole(tmp_path / "f", slow)
    assert contents(tmp_path) == {"f": b"aaaa"}


def test_a_folder_that_another_job_has_completed_and_tidied_is_no_error(tmp_path):
    def swept(temporary):
        temporary.write_bytes(b"x")
        (tmp_path / "f").write_bytes(b"y")
        temporary.unlink()

    write_whole(tmp_path / "f", swept)
    assert contents(tmp_path) == {"f": b"y"}
    (tmp_path / "f").unlink()
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "f", lambda temporary: None)


def test_only_old_temporary_files_are_removed(tmp_path):
    for name, age in (("a.tmp", OLD + 60), ("b.tmp", OLD - 60), ("c.parquet", OLD + 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_old(tmp_path)
    assert sorted(contents(tmp_path)) == ["b.tmp", "c.parquet"]


def write_latents(folder):
    units = open_units("digits", "validation", "0/9", 7)
    LatentCache.build(folder, units.dataset, PixelCodec(), 8, "digits", 7, 3, quiet=True)


def write_ranks(folder):
    units, orderer = open_units("digits", "validation", "0/9", 7), CollapseOrder.baseline("variance")
    transform = eval_transform(16, orderer.mean, orderer.std)
    source = order_source("digits", units.images, (16, 16), (4, 4), "variance", orderer)
    write_orders(folder, units, source, orderer, lambda x: orderer(x, grid=(4, 4)), transform, batch_size=3, quiet=True)
    check_orders(folder)


@pytest.mark.parametrize("write", [write_latents, write_ranks])
def test_two_jobs_on_one_folder_leave_what_one_leaves(tmp_path, write):
    write(tmp_path / "one")
    (tmp_path / "two").mkdir()
    kind = "latents" if write is write_latents else "orders"
    (tmp_path / "two" / f"{kind}-00000-of-00006.x.host-1.tmp").write_bytes(b"left by a killed process")
    jobs = [threading.Thread(target=write, args=(tmp_path / "two",)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(contents(tmp_path / "one")) == 6


def test_every_unit_is_written_once_by_one_process(tmp_path):
    units = open_units("digits", "validation", "0/9", 7)  # 40 images
    shards = Shards(tmp_path / "new", "sums", "txt", lambda file: {}, "folder", "go on")
    files, encoded, written = shards.files(6), [], []
    assert [file.name for file in files][::5] == ["sums-00000-of-00006.txt", "sums-00005-of-00006.txt"]

    def encode(unit, images):
        encoded.append((unit, len(images)))
        return [images.sum((1, 2, 3)), torch.full((len(images), 2), unit)]

    def save(file, unit, keys, labels, columns):
        written.append((unit, len(keys), tuple(labels.shape), *[tuple(column.shape) for column in columns]))
        file.write_text(",".join(keys))

    for rank in (1, 0):
        write_shards(files, units, lambda unit: 7 if unit == 2 else None, encode, save,
                     eval_transform(8, (0.0,) * 3, (1.0,) * 3), 4, 0, rank, 2, True)  # fmt: skip
    assert written == [(1, 7, (7,), (7,), (7, 2)), (3, 7, (7,), (7,), (7, 2)), (5, 5, (5,), (5,), (5, 2)),
                       (0, 7, (7,), (7,), (7, 2)), (4, 7, (7,), (7,), (7, 2))]  # fmt: skip
    assert encoded[:4] == [(1, 4), (1, 3), (3, 4), (3, 3)]
    assert files[5].read_text() == ",".join(str(9 * index) for index in range(35, 40))
    assert shards.found() == [file for number, file in enumerate(files) if number != 2]
