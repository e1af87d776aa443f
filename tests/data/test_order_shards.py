"""Orders of a whole data set: the same whatever reads the images, however many processes write, and where they end."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset

from timm_collapse import CollapseError, CollapseOrder, __version__
from timm_collapse.data import (
    OrderedImages,
    OrderTable,
    check_orders,
    describe_dataset,
    eval_transform,
    open_dataset,
    open_units,
)
from timm_collapse.data.order_shards import is_whole, write_orders
from timm_collapse.data.units import MapUnits
from timm_collapse.engine import order_source

COUNT = 40  # digits, every ninth of the validation split


def digits():
    return [open_dataset("digits", "validation", "0/9").dataset[index] for index in range(COUNT)]


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder, sizes, labels=True, prefix="train"):
    """Tar files in webdataset's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    images = iter(enumerate(digits()))
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"{prefix}-{number:03d}.tar", "w") as tar:
            for _ in range(size):
                index, (image, label) = next(images)
                add(tar, f"some/{index:04d}.json", b"{}")
                add(tar, f"some/{index:04d}.PNG", png(image))
                if labels:
                    add(tar, f"some/{index:04d}.cls", str(label).encode())
    return folder


def write(folder, units, name="variance", rank=0, world=1, compute=None, seed=0, **kwargs):
    orderer = CollapseOrder.baseline(name, seed)
    transform = eval_transform(16, orderer.mean, orderer.std)
    source = order_source("digits", units.images, (16, 16), (4, 4), name, orderer)

    def order(images):
        if compute:
            compute(images)
        return orderer(images, grid=(4, 4))

    kwargs = {"batch_size": 3, "quiet": True, **kwargs}
    write_orders(folder, units, source, orderer, order, transform, rank=rank, world=world, **kwargs)


def units(shard_size=7):
    return open_units("digits", "validation", "0/9", shard_size)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows(folder):
    """Key -> (label, ranks, ranks of the mirror image), over all files."""
    tables = [pq.ParquetFile(file).read().to_pylist() for file in sorted(folder.glob("*.parquet"))]
    return {row["key"]: (row["label"], row["ranks"], row["ranks_mirrored"]) for table in tables for row in table}


# -- what is written ---------------------------------------------------------------------------------------------------


def test_files_hold_what_they_say(tmp_path):
    write(tmp_path, units())
    assert sorted(contents(tmp_path)) == [f"orders-{n:05d}-of-00006.parquet" for n in range(6)]
    dataset = open_dataset("digits", "validation", "0/9").dataset
    orderer = CollapseOrder.baseline("variance")
    transform = eval_transform(16, orderer.mean, orderer.std)
    found = rows(tmp_path)
    assert list(found) == [str(9 * index) for index in range(COUNT)]  # the index in the whole split
    for index in (0, 8, 39):
        image = transform(dataset[index][0])[None]
        label, *ranks = found[str(9 * index)]
        assert label == dataset[index][1]
        assert ranks == [orderer(view, grid=(4, 4)).ranks[0].tolist() for view in (image, image.flip(-1))]
    schema = pq.read_schema(tmp_path / "orders-00005-of-00006.parquet")
    assert schema.field("label").type == pa.int32() and schema.field("ranks").type == pa.list_(pa.uint8(), 16)
    layout = json.loads(schema.metadata[b"timm_collapse"])
    assert layout == {
        "dataset": "digits", "images": COUNT, "img_size": [16, 16], "grid": [4, 4], "orderer": "variance",
        "weights": layout["weights"], "mirrored": True, "precision": "no", "unit": "7 images", "files": 6,
        "version": __version__, "contents": "images 35 to 39", "rows": 5,
    }  # fmt: skip
    metadata = pq.read_metadata(tmp_path / "orders-00000-of-00006.parquet").row_group(0).column(0)
    assert metadata.compression == "ZSTD"
    assert check_orders(tmp_path) == (COUNT, COUNT, 6, "")


@pytest.mark.parametrize("name", ["variance", "random"])
def test_any_number_of_processes_and_workers_writes_the_same(tmp_path, name):
    write(tmp_path / "one", units(), name)
    for rank in (2, 0, 1):
        write(tmp_path / "three", units(), name, rank, world=3, workers=rank)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    write(tmp_path / "other", units(), name, seed=1)
    same = rows(tmp_path / "one") == rows(tmp_path / "other")
    assert same == (name == "variance")
    if name == "random":
        ranks = [str(row[1]) for row in rows(tmp_path / "one").values()]
        assert len(set(ranks)) == COUNT  # every unit draws its own
        with pytest.raises(CollapseError, match="orderer is 'random seed 0', not 'random seed 1'"):
            write(tmp_path / "one", units(), name, seed=1)


def test_a_stopped_run_goes_on_with_other_processes(tmp_path):
    write(tmp_path / "whole", units(), "random")
    done = []

    def stops(images):
        done.append(len(images))
        if sum(done) > 2 * 15:
            raise KeyboardInterrupt

    folder = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        write(folder, units(), "random", compute=stops)
    assert len(contents(folder)) == 2
    for rank in (0, 1):
        write(folder, units(), "random", rank, world=2)
    assert contents(folder) == contents(tmp_path / "whole")

    done.clear()
    write(folder, units(), "random", compute=lambda images: done.append(images))
    assert not done


def test_only_missing_and_damaged_files_are_written_again(tmp_path):
    write(tmp_path, units())
    before = contents(tmp_path)
    names = sorted(before)
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes(before[names[1]][:-9])
    at = len(before[names[3]]) // 4  # among the values, which only checksums guard
    (tmp_path / names[3]).write_bytes(before[names[3]][:at] + b"\0\1\2\3" + before[names[3]][at + 4 :])
    (tmp_path / f"{names[2]}.host-1.tmp").write_bytes(b"half")
    assert not is_whole(tmp_path)
    with pytest.raises(CollapseError, match=f"order_table: .*{names[1]} is damaged or holds no orders; delete it and"):
        OrderTable.load(tmp_path)
    again = []
    write(tmp_path, units(), compute=lambda images: again.append(len(images)))
    assert sum(again) == 2 * 3 * 7
    check_orders(tmp_path)  # removes what a killed process left
    assert contents(tmp_path) == before


def test_damage_among_the_values_is_seen_when_the_table_is_read(tmp_path):
    write(tmp_path, units())
    file = tmp_path / "orders-00002-of-00006.parquet"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 4] + b"\0\1\2\3" + data[len(data) // 4 + 4 :])
    with pytest.raises(CollapseError, match="orders-00002-of-00006.parquet is damaged; delete it and start"):
        OrderTable.load(tmp_path)


def test_a_folder_with_missing_files_is_refused(tmp_path):
    write(tmp_path, units(), rank=0, world=2)
    with pytest.raises(CollapseError, match="lacks 3 of 6 files, the first orders-00001-of-00006.parquet; start"):
        OrderTable.load(tmp_path)
    with pytest.raises(CollapseError, match="lacks 3 of 6 files"):
        check_orders(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "bayer"}, "orderer is 'variance', not 'bayer'"),
        ({"mirrored": False}, "mirrored is True, not False"),
        ({"precision": "bf16"}, "precision is 'no', not 'bf16'"),
        ({"units": open_units("digits", "validation", "0/9", 9)}, "unit is '7 images', not '9 images', files is 6, no"),
        ({"units": open_units("digits", "validation", "0/8", 7)}, "images is 40, not 45"),
    ],
)
def test_a_folder_of_other_orders_is_refused_and_left_alone(tmp_path, change, message):
    write(tmp_path, units(), rank=0, world=2)
    before = contents(tmp_path)
    with pytest.raises(CollapseError, match=f"holds other orders: {message}.*; choose another folder"):
        write(tmp_path, **{"units": units(), **change})
    assert contents(tmp_path) == before


# -- where the images come from ----------------------------------------------------------------------------------------


def test_all_sources_of_the_same_images_agree(tmp_path):
    write(tmp_path / "expected", units())
    expected = list(rows(tmp_path / "expected").values())
    images = digits()

    blobs = pa.array([{"bytes": png(image), "path": None} for image, _ in images])
    (tmp_path / "parquet").mkdir()
    for part in range(2):
        table = pa.table({"image": blobs, "label": [label for _, label in images]}).slice(part * 25, 25)
        pq.write_table(table, tmp_path / "parquet" / f"train-{part}.parquet")
    write(tmp_path / "a", open_units(str(tmp_path / "parquet"), shard_size=11), workers=2)
    assert list(rows(tmp_path / "a").values()) == expected

    for index, (image, label) in enumerate(images):
        file = tmp_path / "folder" / "train" / f"digit {label}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    write(tmp_path / "b", open_units(str(tmp_path / "folder"), shard_size=11), workers=1)
    found = rows(tmp_path / "b")
    assert all(key == f"digit {label}/{key[-6:]}" for key, (label, *_) in found.items())
    assert [found[key] for key in sorted(found, key=lambda key: key[-6:])] == expected

    write(tmp_path / "c", open_units(str(write_tars(tmp_path / "tars", [9, 1, 24, 6]))), workers=2)
    assert list(rows(tmp_path / "c").values()) == expected
    assert list(rows(tmp_path / "c")) == [f"some/{index:04d}" for index in range(COUNT)]
    assert check_orders(tmp_path / "c") == (COUNT, COUNT, 4, "")

    with tarfile.open(tmp_path / "one.tar", "w") as tar:  # as timm reads it: folders are classes, sorted by name
        for index, (image, label) in reversed(list(enumerate(images))):
            add(tar, f"{label}/{index:04d}.png", png(image))
    write(tmp_path / "d", MapUnits(ImageDataset(str(tmp_path / "one.tar")), 11))
    found = rows(tmp_path / "d")
    assert [found[key] for key in sorted(found, key=lambda key: key[-4:])] == expected
    write(tmp_path / "e", open_units(str(tmp_path / "one.tar")))
    assert list(rows(tmp_path / "e")) == [f"{label}/{index:04d}" for index, (_, label) in enumerate(images)][::-1]
    assert [(-1, *found[key][1:]) for key in found] == [rows(tmp_path / "e")[key] for key in found]


def test_tars_are_written_alike_by_any_number_of_processes_and_workers(tmp_path):
    folder = str(write_tars(tmp_path / "tars", [6, 7, 2, 25]))
    write(tmp_path / "one", open_units(folder), "random")
    for rank in (1, 0):
        write(tmp_path / "two", open_units(folder), "random", rank, world=2, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for file, size in zip(sorted((tmp_path / "one").iterdir()), (6, 7, 2, 25)):
        assert pq.read_metadata(file).num_rows == size
        assert json.loads(pq.read_schema(file).metadata[b"timm_collapse"])["rows"] == size
    (tmp_path / "tars" / "train-001.tar").rename(tmp_path / "tars" / "train-0010.tar")
    with pytest.raises(CollapseError, match="holds the orders of 'train-001.tar', not 'train-0010.tar'; choose anot"):
        write(tmp_path / "one", open_units(folder), "random")


def test_no_batch_holds_images_of_two_units(tmp_path):
    folder = str(write_tars(tmp_path / "tars", [6, 7, 2, 25]))
    for opened, sizes in ((open_units(folder), [6, 7, 2, 25]), (units(), [7] * 5 + [5])):
        for workers in (0, 2):
            batches = list(opened.batches([0, 2, 3], eval_transform(8, (0.5,) * 3, (0.5,) * 3), 4, workers))
            assert all(len(images) == len(keys) == len(labels) for _, images, keys, labels in batches)
            counts = [(unit, len(keys)) for unit, _, keys, _ in batches]
            assert counts == [(u, n) for u in (0, 2, 3) for n in [4] * (sizes[u] // 4) + [sizes[u] % 4] if n]


def test_images_without_labels(tmp_path):
    write(tmp_path / "orders", open_units(str(write_tars(tmp_path / "tars", [40], labels=False))))
    assert {label for label, *_ in rows(tmp_path / "orders").values()} == {-1}


def test_an_unreadable_image_is_told_and_not_replaced_by_the_next_one(tmp_path):
    for name in ("a/0", "a/1", "b/0"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
    broken = tmp_path / "images" / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    units = open_units(str(tmp_path / "images"))
    with pytest.raises(CollapseError, match="dataset: the image 'a/1.png' cannot be decoded"):
        list(units.batches([0], lambda image: torch.zeros(3, 2, 2), 2))
    layout = {"grid": (1, 1), "img_size": (16, 16), "dataset": "", "orderer": "", "weights": ""}
    table = OrderTable(torch.zeros(2, 3, 1, dtype=torch.uint8), torch.zeros(3), layout)
    ordered = OrderedImages(units.dataset, table, lambda image: torch.full((3, 2, 2), float(image.width)))
    assert ordered[2][1] == 1 and ordered[0][0].unique() == 16
    with pytest.raises(CollapseError, match="'a/1.png' cannot be decoded"):
        ordered[1]


def test_keys_that_several_tars_share_are_told(tmp_path):
    folder = write_tars(tmp_path / "tars", [40])
    (folder / "train-001.tar").write_bytes((folder / "train-000.tar").read_bytes())
    write(tmp_path / "orders", open_units(str(folder)))
    assert check_orders(tmp_path / "orders") == (80, 40, 2, "some/0000")


def test_a_stream_cannot_be_looked_up_by_the_index_of_a_data_set(tmp_path):
    write(tmp_path / "orders", open_units(str(write_tars(tmp_path / "tars", [20, 20]))))
    others = open_dataset("digits", "validation", "0/8").dataset
    with pytest.raises(CollapseError, match="orders of 40 images, the data set has 45; it has the images of a stream"):
        OrderTable.load(tmp_path / "orders", dataset=others)
    same = open_dataset("digits", "validation", "0/9").dataset
    with pytest.raises(CollapseError, match="the order of 'some/0000' at index 0, where .* has '0'; .* stream of tar"):
        OrderTable.load(tmp_path / "orders", dataset=same)


def test_names_of_streams(tmp_path):
    tars = write_tars(tmp_path / "a", [10, 10, 20])
    pattern = f"{tars}/train-{{000..002}}.tar"
    for name in (str(tars), f"{tars}/train-*.tar", pattern, f"wds/{tars}", f"wds/{pattern}"):
        assert [file.name for file in open_units(name).files] == [f"train-{n:03d}.tar" for n in range(3)], name
    assert len(open_units(f"{tars}+{tars}/train-{{001..001}}.tar")) == 4
    assert open_units(str(tars / "train-001.tar")).files == [tars / "train-001.tar"]
    write_tars(tars, [5], prefix="val")
    assert [file.name for file in open_units(str(tars), "validation").files] == ["val-000.tar"]
    assert len(open_units(str(tars), "train")) == 3
    write_tars(tmp_path / "b" / "test", [7], prefix="x")
    assert [file.name for file in open_units(str(tmp_path / "b"), "validation").files] == ["x-000.tar"]
    for name, split, part, message in (
        (str(tars), "train", "0/2", "part: must be empty for tar files"),
        (str(write_tars(tmp_path / "c", [7])), "validation", "", "split: .* has no tar file of split 'validation'"),
        (f"{tars}/train-{{002..003}}.tar", "train", "", "train-003.tar, which does not exist"),
        (f"{tars}/none-*.tar", "train", "", "none-.*tar, which does not exist"),
        (f"wds/{tmp_path}/nothing", "train", "", "which does not exist"),
    ):
        with pytest.raises(CollapseError, match=message):
            open_units(name, split, part)


def test_an_archive_beside_a_folder_of_images_is_no_stream(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.png").write_bytes(png(digits()[0][0]))
    write_tars(tmp_path, [3])
    assert open_units(str(tmp_path), "train").images == 1


@pytest.mark.parametrize(
    "damage, message",
    [
        ("truncated", "train-001.tar is damaged or no tar file: unexpected end of data"),
        ("text", "train-001.tar is damaged or no tar file"),
        ("image", "the image 'b' in .*train-001.tar cannot be decoded"),
        ("label", "the label of 'b' in .*train-001.tar must be an integer, got b'dog'"),
        ("empty", r"train-001.tar holds no images \(jpg, jpeg, png"),
        ("dots", "the file name 'v.2.png' in .*train-001.tar must have one dot"),
    ],
)
def test_damaged_tars_are_told_in_one_line(tmp_path, damage, message):
    file = write_tars(tmp_path / "tars", [4]) / "train-001.tar"
    image = png(digits()[0][0])
    members = {"truncated": {"a.png": image}, "text": {}, "image": {"a.png": image, "b.png": image[:60]},
               "label": {"b.png": image, "b.cls": b"dog"}, "empty": {"a.txt": b""},
               "dots": {"a.png": image, "v.2.png": image}}[damage]  # fmt: skip
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:600])
    if damage == "text":
        file.write_text("no tar " * 200)
    with pytest.raises(CollapseError, match=message) as error:
        write(tmp_path / "orders", open_units(str(tmp_path / "tars")), workers=int(damage == "image"))
    assert "\n" not in str(error.value)
    assert sorted(contents(tmp_path / "orders")) in ([], ["orders-00000-of-00002.parquet"])


def test_descriptions_do_not_name_folders():
    assert describe_dataset("/data/a+b/c/", "train") == "a+c train"
    assert describe_dataset("digits", "validation", "0/9") == "digits validation 0/9"


def test_network_orderers_have_their_weights_in_the_source():
    def source(orderer, name="x/y"):
        return order_source("digits", 3, (16, 16), (4, 4), name, orderer)

    first, second = (CollapseOrder.from_pretrained("collapse_ranker_tiny") for _ in range(2))
    assert source(first) == source(second) and source(first)["orderer"] == "y"
    with torch.no_grad():
        next(second.parameters()).add_(1.0)
    assert source(first) != source(second)
