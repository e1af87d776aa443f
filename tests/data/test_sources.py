"""One decoder, one rule for unreadable images, and one description, whatever a data set is read from."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, Subset

from timm_collapse.data import (
    StepLoader,
    as_images,
    describe_dataset,
    eval_transform,
    labels_of,
    open_dataset,
    open_units,
)
from timm_collapse.data.images import load_photo, photo_tensor
from timm_collapse.data.sources import joined_names, same_source
from timm_collapse.evaluation import image_batches
from timm_collapse.order import CollapseError

READERS = ("folder", "tar", "stream", "parquet", "hfds", "joined")


def encoded(image, format_, **options):
    data = io.BytesIO()
    image.save(data, format_, **options)
    return data.getvalue()


def odd_images():
    """File name -> an image of a kind that a plain `convert("RGB")` would spoil, and others."""
    ramp = np.linspace(0, 1, 40 * 24).reshape(24, 40)
    palette = Image.fromarray((ramp * 3).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    alpha = Image.merge("LA", (grey, grey.transpose(Image.Transpose.ROTATE_180)))
    colour = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a_16bit.png": encoded(Image.fromarray((ramp * 65535).astype(np.uint16)), "PNG"),
        "b_palette.png": encoded(palette, "PNG", transparency=1),
        "c_grey_alpha.png": encoded(alpha, "PNG"),
        "d_alpha.png": encoded(Image.merge("RGBA", (*colour.split(), grey)), "PNG"),
        "e_cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "f_rotated.jpg": encoded(colour, "JPEG", exif=exif),
        "g_plain.png": encoded(colour, "PNG"),
    }


def make(reader, folder, files):
    """Images under their names, in a data set of a kind; -> its name."""
    if reader in ("folder", "joined"):
        for name, data in files.items():
            (folder / "set" / "class").mkdir(parents=True, exist_ok=True)
            (folder / "set" / "class" / name).write_bytes(data)
        return f"{folder / 'set'}+digits" if reader == "joined" else str(folder / "set")
    if reader in ("tar", "stream"):
        with tarfile.open(folder / "set.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"class/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(folder / "set.tar")
    (folder / "set").mkdir()
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    table = pa.table({"image": cells, "label": [0] * len(cells)})
    pq.write_table(table, folder / "set" / "train-0.parquet", row_group_size=2)
    return f"{'hfds/' if reader == 'hfds' else ''}{folder / 'set'}"


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    """`datasets` writes into the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def tensors(reader, name, transform, workers=0):
    """Key -> tensor of all images of a data set, as the commands read them."""
    if reader == "stream":
        batches = open_units(name).batches([0], transform, 2, workers)
        return [image for _, images, _, _ in batches for image in images]
    return [
        image for images, _ in image_batches(open_dataset(name).dataset, transform, 0, 2, workers) for image in images
    ]


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_what_the_order_command_sees(tmp_path, reader):
    files = odd_images()
    found = tensors(reader, make(reader, tmp_path, files), eval_transform(16, (0.0,) * 3, (1.0,) * 3))
    for image, (name, data) in zip(found, files.items()):
        (tmp_path / name).write_bytes(data)
        assert torch.equal(image, photo_tensor(load_photo(tmp_path / name), 16)), name
    whole = open_units(make(reader, tmp_path, {})).images if reader == "joined" else len(files)
    assert len(found) == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reader", READERS)
def test_an_image_that_cannot_be_read_is_named_and_none_takes_its_place(tmp_path, reader, workers):
    files = odd_images()
    files["d_alpha.png"] = files["d_alpha.png"][:60]
    name = make(reader, tmp_path, files)
    key = {
        "folder": "class/d_alpha.png",
        "joined": "class/d_alpha.png",
        "tar": "class/d_alpha",
        "stream": "class/d_alpha",
    }.get(reader, "3")
    with pytest.raises(CollapseError) as error:
        tensors(reader, name, eval_transform(16, (0.0,) * 3, (1.0,) * 3), workers)
    message = str(error.value)
    assert message.startswith("dataset: the image ") and "cannot be decoded" in message and "\n" not in message
    assert f"'{key}'" in message and str(tmp_path / "set") in message
    if reader != "stream":
        transform = eval_transform(16, (0.0,) * 3, (1.0,) * 3)
        with pytest.raises(CollapseError, match="^dataset: the image .* cannot be decoded"):
            list(StepLoader(Subset(open_dataset(name).dataset, range(7)), transform, 7, range(1), workers=workers))


def test_timm_and_torch_data_sets_are_taken_too(tmp_path):
    name = make("folder", tmp_path, odd_images())
    theirs = ImageDataset(name)
    ours = as_images(ConcatDataset([theirs, Subset(theirs, [5, 0])]))
    assert len(ours) == 9 and labels_of(ours).tolist() == [0] * 9
    assert ours[7][0].size == (24, 40) and ours[8][0].getpixel((20, 12)) == ours[0][0].getpixel((20, 12))


def test_labels_of_others_data_sets():
    class Odd(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Image.new("L", (2, 2)), [None, torch.tensor(3), [1, 2], np.int32(5)][index]

    assert labels_of(Odd()).tolist() == [-1, 3, -1, 5] and as_images(Odd())[1][1] == 3
    assert as_images(Odd())[0][0].mode == "RGB"


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_plus_in_the_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = make("folder", tmp_path, odd_images())
    (tmp_path / "set").rename(tmp_path / "my+set+1")
    name = name.replace("set", "my+set+1")
    assert joined_names(name) == [name] and joined_names(f"{name}+digits+{name}") == [name, "digits", name]
    assert len(open_dataset(name).dataset) == 7 and len(open_dataset(f"digits+{name}").dataset) == 1437 + 7
    assert open_units(name).images == 7
    assert describe_dataset(name, "train") == "my+set+1 train"
    assert describe_dataset("my+set+1+digits", "train", "0/2") == "my+set+1+digits train 0/2"
    monkeypatch.chdir(tmp_path / "my+set+1")
    assert describe_dataset(".", "train") == "my+set+1 train"


@pytest.mark.parametrize(
    "name, message",
    [
        ("no/such/folder", "dataset: 'no/such/folder' is neither 'digits', a folder or tar file that exists"),
        ("/no/such", "dataset: '/no/such' is neither"),
        ("digits+", "dataset: '' is neither"),
        ("torch/cifar10", "dataset: 'torch/cifar10': torchvision's data sets have no names here"),
        ("wds/x", "dataset: 'wds/x' can only be streamed"),
        ("tfds/mnist", "dataset: 'tfds/mnist' can only be streamed"),
        ("hfds/no/such-data-set", "dataset: 'hfds/no/such-data-set', split 'train' could not be opened: "),
        ("{tmp}/empty", "dataset: '.*empty' holds no images: Found 0 images"),
        ("{tmp}/file.txt", "dataset: '.*file.txt' holds no images"),
        ("{tmp}/broken.tar", "dataset: '.*broken.tar' is damaged"),
        ("{tmp}/bare.tar", "dataset: '.*bare.tar' holds no images"),
    ],
)
def test_names_of_nothing_are_one_line(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken.tar").write_text("no tar " * 200)
    tarfile.open(tmp_path / "bare.tar", "w").close()
    with pytest.raises(CollapseError, match=message) as error:
        open_dataset(name.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_a_part_without_images_is_told():
    with pytest.raises(CollapseError, match="'digits' has no images of split 'validation', part '360/361'"):
        open_dataset("digits", "validation", "360/361")


def test_splits_are_found_under_all_their_names(tmp_path):
    """timm itself would read the whole folder, train images included, where the split is called test."""
    for split, count in (("train", 3), ("test", 2)):
        for index in range(count):
            (tmp_path / split / "cat").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(tmp_path / split / "cat" / f"{index}.png")
    assert len(open_dataset(str(tmp_path), "validation").dataset) == 2
    assert open_dataset(str(tmp_path), "validation").dataset.class_to_idx == {"cat": 0}
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(CollapseError, match=r"no folder of split 'validation', only \['other', 'train'\]"):
        open_dataset(str(tmp_path), "validation")


def test_hub_data_sets_have_names_of_classes_and_splits(tmp_path):
    import datasets

    kinds = datasets.ClassLabel(names=["ant", "bee", "cat"])
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds, "text": datasets.Value("string")})
    rows = [{"picture": {"bytes": data, "path": None}, "kind": i % 2, "text": "x"} for i, data in
            enumerate(odd_images().values())]  # fmt: skip
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features).to_parquet(str(tmp_path / "set" / "test-00000-of-00001.parquet"))
    for name in (f"hfds/{tmp_path / 'set'}", str(tmp_path / "set")):
        info = open_dataset(name, "validation", labelled=True)
        assert info.num_classes == 3 and labels_of(info.dataset).tolist() == [0, 1, 0, 1, 0, 1, 0]
        assert info.dataset.class_to_idx == {"ant": 0, "bee": 1, "cat": 2} and info.dataset[5][0].size == (24, 40)
    with pytest.raises(CollapseError, match="split 'train' could not be opened"):
        open_dataset(f"hfds/{tmp_path / 'set'}", "train")


def test_descriptions_of_earlier_versions_are_known():
    assert same_source("imagenet train", "imagenet train", 9)
    assert same_source("data/imagenet train", "imagenet train", 9)  # as `latents` put it
    assert same_source("imagenet train 9", "imagenet train", 9)  # as train/cmar.py put it
    assert not same_source("imagenet train 8", "imagenet train", 9)
    assert not same_source("imagenet validation", "imagenet train", 9)
