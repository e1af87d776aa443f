"""Parquet files of any size: which columns, how much memory, and every image by its row."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_collapse.data import labels_of, open_dataset, parquet
from timm_collapse.order import CollapseError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_COLLAPSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value, size=(4, 3)):
    data = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def write(file, images, features=None, group=None, **columns):
    """A parquet file of images and further columns, with Hugging Face's features if given."""
    table = pa.table({"image" if "picture" not in columns else "picture": images,
                      **{k: v for k, v in columns.items() if k != "picture"}})  # fmt: skip
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)
    return file


def cells(count):
    return [{"bytes": png(i), "path": None} for i in range(count)]


def reds(dataset, indices):
    return [dataset[i][0].getpixel((0, 0))[0] for i in indices]


CLASS = {"_type": "ClassLabel", "names": ["ant", "bee", "cat", "dog"]}
VALUE = {"_type": "Value", "dtype": "int64"}


# -- columns -----------------------------------------------------------------------------------------------------------


def test_columns_are_found_by_their_features(tmp_path):
    features = {
        "picture": {"_type": "Image"},
        "thumb": {"_type": "Value", "dtype": "binary"},
        "id": VALUE,
        "kind": CLASS,
    }
    write(
        tmp_path / "train-0.parquet", cells(3), features, picture=True, thumb=[b"x"] * 3, id=[7, 8, 9], kind=[2, 0, 2]
    )
    info = open_dataset(str(tmp_path), labelled=True)
    assert info.num_classes == 4  # as named, not as many as happen to be there
    assert [label for _, label in info.dataset] == [2, 0, 2] and reds(info.dataset, range(3)) == [0, 1, 2]
    assert info.dataset.class_to_idx == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}


def test_of_several_classes_the_usual_name_is_taken(tmp_path):
    features = {"image": {"_type": "Image"}, "coarse_label": CLASS, "fine_label": CLASS}
    write(tmp_path / "train-0.parquet", cells(2), features, coarse_label=[0, 1], fine_label=[3, 2])
    assert labels_of(open_dataset(str(tmp_path)).dataset).tolist() == [3, 2]


def test_without_features_columns_are_found_by_type_and_name(tmp_path):
    write(tmp_path / "train-0.parquet", [png(i) for i in range(3)], picture=True, labels=[0, 4, 1])
    info = open_dataset(str(tmp_path), labelled=True)
    assert info.num_classes == 5 and reds(info.dataset, [2, -1, 0]) == [2, 2, 0]


@pytest.mark.parametrize(
    "features, columns, message",
    [
        (None, {"category": [0, 1]}, r"of its columns \['image', 'category'\], none is a ClassLabel"),
        (None, {"label": ["cat", "dog"]}, r"none of the integers is named 'label', 'labels', 'fine_label'"),
        (None, {"label": [0, None]}, "not all of its images have a label"),
        (None, {"label": [-1, -1]}, "not all of its images have a label"),
        ({"image": {"_type": "Image"}, "a": CLASS, "b": CLASS}, {"a": [0, 1], "b": [1, 0]}, r"ClassLabels, \['a', "),
    ],
)  # fmt: skip
def test_labels_that_are_unknown_are_refused_only_where_they_are_needed(tmp_path, features, columns, message):
    write(tmp_path / "train-0.parquet", cells(2), features, **columns)
    info = open_dataset(str(tmp_path))
    assert info.dataset[1][1] == -1 and reds(info.dataset, range(2)) == [0, 1]
    with pytest.raises(CollapseError, match=f"has no labels, which are needed here: .*{message}"):
        open_dataset(str(tmp_path), labelled=True)
    with pytest.raises(CollapseError, match="has no labels"):
        open_dataset(f"digits+{tmp_path}", labelled=True)


def test_images_that_cannot_be_told_and_files_that_differ_are_refused(tmp_path):
    write(tmp_path / "a" / "train-0.parquet", cells(1), picture=True, other=[b"x"])
    with pytest.raises(CollapseError, match=r"several columns of images, \['picture', 'other'\].*no column 'image'"):
        open_dataset(str(tmp_path / "a"))
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        write(tmp_path / "b" / f"train-{number}.parquet", cells(1), features, label=[0])
    with pytest.raises(CollapseError, match="different class names"):
        open_dataset(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train-0.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(CollapseError, match="train-0.parquet is damaged or no parquet file"):
        open_dataset(str(tmp_path / "c"))


def test_an_image_in_a_file_of_its_own_and_one_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(9))
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, {"bytes": None, "path": "b.png"}]
    write(tmp_path / "train-0.parquet", rows, label=[0, 1, 2])
    for held in (parquet.HELD_BYTES, 1):
        monkeypatch.setattr(parquet, "HELD_BYTES", held)
        dataset = open_dataset(str(tmp_path)).dataset
        assert dataset[0][0].getpixel((0, 0)) == (9, 0, 0)
        for index in (1, 2):
            with pytest.raises(CollapseError, match=f"dataset: the image '{index}' cannot be decoded: the file in .*"):
                dataset[index]


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def big(tmp_path, monkeypatch):
    """60 images in 12 row groups of 5, in two files, of which a process may hold two groups."""
    for number in range(2):
        images = [{"bytes": png(30 * number + i), "path": None} for i in range(30)]
        file = write(tmp_path / "data" / f"train-{number}.parquet", images, group=5, label=[number] * 30)
    metadata = pq.read_metadata(file)
    assert metadata.num_row_groups == 6
    monkeypatch.setattr(parquet, "HELD_BYTES", int(2.5 * metadata.row_group(0).total_byte_size))
    return str(tmp_path / "data")


def test_from_front_to_back_nothing_is_written(big, cache):
    dataset = open_dataset(big).dataset
    assert reds(dataset, range(60)) == list(range(60)) and len(dataset._held) <= 2
    assert reds(dataset, range(0, 60, 7)) == list(range(0, 60, 7))  # another pass
    assert not cache.exists()


def test_shuffled_reads_unpack_once_for_all(big, cache, monkeypatch):
    dataset = open_dataset(big).dataset
    permutation = torch.randperm(60).tolist()
    assert reds(dataset, permutation) == permutation
    assert len(list(cache.rglob("*.images"))) >= 8  # but for those that were read before it was clear
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    assert reds(open_dataset(big).dataset, permutation) == permutation
    assert len(list(cache.rglob("*.images"))) == 12 and not list(cache.rglob("*.tmp"))
    monkeypatch.setattr(parquet, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert reds(open_dataset(big).dataset, permutation) == permutation


def test_two_groups_are_shuffled_as_many_are(big, cache, monkeypatch):
    monkeypatch.setattr(parquet, "HELD_BYTES", pq.read_metadata(f"{big}/train-0.parquet").row_group(0).total_byte_size)
    dataset, read = open_dataset(big).dataset, []
    hold = type(dataset)._hold
    monkeypatch.setattr(type(dataset), "_hold", lambda self, number: (read.append(number), hold(self, number)))
    assert reds(dataset, [0, 9] * 20) == [0, 9] * 20
    assert len(read) <= 2 * (parquet.PASSES + 1) and len(list(cache.rglob("*.images"))) == 1  # the other one is held


def test_groups_that_are_too_large_are_unpacked_at_once(big, cache, monkeypatch):
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    dataset = open_dataset(big).dataset
    assert reds(dataset, range(60)) == list(range(60)) and len(list(cache.rglob("*.images"))) == 12
    assert not dataset._held


def test_a_small_data_set_is_held_and_never_unpacked(tmp_path, cache):
    write(tmp_path / "train-0.parquet", cells(20), group=5, label=[0] * 20)
    dataset = open_dataset(str(tmp_path)).dataset
    permutation = torch.randperm(20).tolist()
    assert reds(dataset, permutation * 2) == permutation * 2 and not cache.exists()


def test_workers_and_pickled_copies_read_the_same(big):
    dataset = open_dataset(big).dataset
    dataset[59], dataset[0], dataset[31]  # something is held, and the process jumps
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(open_dataset(big).dataset)) + 100
    assert reds(pickle.loads(pickle.dumps(dataset)), [59, 3]) == [59, 3]
    permutation = torch.randperm(60).tolist()
    loader = DataLoader(dataset, sampler=permutation, batch_size=None, num_workers=2)
    assert [image.getpixel((0, 0))[0] for image, _ in loader] == permutation


def test_a_process_holds_a_bounded_part(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 50_000), np.uint8)
    write(tmp_path / "train-0.parquet", [row.tobytes() for row in noise], group=4, label=[0] * 64)  # 3.2 MB
    monkeypatch.setattr(parquet, "HELD_BYTES", 500_000)
    dataset = open_dataset(str(tmp_path)).dataset
    before, peak = pa.total_allocated_bytes(), 0
    for index in (*range(64), *torch.randperm(64).tolist()):
        assert dataset.read(index) == noise[index].tobytes()
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 1_600_000  # of 3.2 MB; Arrow rounds buffers up


def test_a_file_that_has_changed_is_unpacked_anew(big, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    assert reds(open_dataset(big).dataset, [3]) == [3]
    images = [{"bytes": png(200, (9, 9)), "path": None}] * 30
    write(tmp_path / "data" / "train-0.parquet", images, group=5, label=[0] * 30)
    assert reds(open_dataset(big).dataset, [3]) == [200]


def test_a_cache_that_cannot_be_written_is_told(big, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIMM_COLLAPSE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    with pytest.raises(CollapseError, match="the images of train-0.parquet cannot be unpacked.*TIMM_COLLAPSE_CACHE"):
        open_dataset(big).dataset[0]


def test_splits_in_folders(tmp_path):
    write(tmp_path / "data" / "train" / "0000.parquet", cells(3), label=[0, 1, 2])
    write(tmp_path / "data" / "test" / "0000.parquet", cells(2), label=[0, 1])
    assert [len(open_dataset(str(tmp_path / "data"), split).dataset) for split in ("train", "validation")] == [3, 2]
