import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset

from timm_collapse.data import StepLoader, eval_transform, labels_of, open_dataset, train_transform
from timm_collapse.order import CollapseError


@pytest.fixture
def parquet(tmp_path):
    rows = []
    for i in range(5):
        buffer = io.BytesIO()
        Image.new("L" if i == 0 else "RGB", (20, 12), color=i * 40 if i == 0 else (i * 40, 0, 0)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": list(range(5))}), tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(pa.table({"image": rows[:2], "label": [0, 1]}), tmp_path / "test-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "odd-0.parquet")
    return tmp_path


def test_digits_splits_are_disjoint_and_complete():
    train, validation = (open_dataset("digits", split) for split in ("train", "validation"))
    assert (len(train.dataset), len(validation.dataset), train.num_classes) == (1437, 360, 10)
    image, label = train.dataset[0]
    assert image.size == (8, 8) and image.mode == "RGB" and 0 <= label < 10


def test_parquet_folder(parquet):
    info = open_dataset(str(parquet), "train")
    assert len(info.dataset) == 5 and info.num_classes == 5
    image, label = info.dataset[3]
    assert image.getpixel((0, 0)) == (120, 0, 0) and label == 3
    assert info.dataset[0][0].mode == "RGB"  # grayscale is converted
    assert len(open_dataset(str(parquet), "validation").dataset) == 2  # found under the name test


def test_parts_are_disjoint_and_joined_sets_add_up(parquet):
    whole = open_dataset(str(parquet), "train").dataset
    part, rest = (open_dataset(str(parquet), "train", p).dataset for p in ("1/3", "!1/3"))
    assert sorted([y for _, y in part] + [y for _, y in rest]) == [y for _, y in whole]
    assert [y for _, y in part] == [1, 4]
    assert len(open_dataset(f"{parquet}+digits", "train").dataset) == 5 + 1437


def test_labels_are_told_without_decoding_images(tmp_path, monkeypatch):
    for name in ("cat", "ant"):
        (tmp_path / "folder" / "train" / name).mkdir(parents=True)
        for i in range(3 if name == "cat" else 2):
            Image.new("RGB", (4, 4)).save(tmp_path / "folder" / "train" / name / f"{i}.png")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "train", "train")
    folder = str(tmp_path / "folder")
    datasets = [open_dataset(name).dataset for name in (folder, f"{folder}+digits")]
    datasets += [ImageDataset(str(tmp_path / "images.tar")), open_dataset(folder, part="!0/2").dataset]
    expected = [[dataset[i][1] for i in range(len(dataset))] for dataset in datasets]
    assert expected[0] == [0, 0, 1, 1, 1] and expected[3] == [0, 1]
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    monkeypatch.setattr(Image, "fromarray", lambda *_: pytest.fail("an image was made"))
    assert [labels_of(dataset).tolist() for dataset in datasets] == expected


def test_labels_that_are_not_listed_are_read_one_by_one():
    class Odd(torch.utils.data.Dataset):
        targets, target_transform = [1, 2], staticmethod(lambda label: 10 * label)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return None, self.target_transform(self.targets[index])

    assert labels_of(Odd()).tolist() == [10, 20]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("no-such-set",), "neither 'digits', a folder"),
        (("digits", "train", "3/3"), "part: expected 'i/n'"),
        (("digits", "train", "x"), "part"),
    ],
)
def test_bad_names_are_explained(arguments, message):
    with pytest.raises(CollapseError, match=message):
        open_dataset(*arguments)


def test_bad_parquet_is_explained(parquet):
    with pytest.raises(CollapseError, match="no column 'image'.*text"):
        open_dataset(str(parquet), "odd")
    with pytest.raises(CollapseError, match="no parquet file of split 'nothing'"):
        open_dataset(str(parquet), "nothing")


def loader(steps, batch=4, seed=0, **kwargs):
    dataset = open_dataset("digits", "validation").dataset
    return StepLoader(dataset, train_transform(16, (0.5,) * 3, (0.5,) * 3), batch, steps, seed, **kwargs)


def test_a_step_depends_on_its_number_alone():
    whole = list(loader(range(0, 6)))
    torch.manual_seed(99)
    rest = list(loader(range(3, 6)))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[3:], rest))
    other = next(iter(loader(range(0, 1), seed=1)))
    assert not torch.equal(whole[0][0], other[0])


def test_processes_and_workers_share_the_global_batch():
    whole = list(loader(range(2), batch=4))
    parts = [list(loader(range(2), batch=2, rank=rank, world=2, workers=rank)) for rank in (0, 1)]
    for step in range(2):
        assert torch.equal(whole[step][0], torch.cat([parts[0][step][0], parts[1][step][0]]))


def test_every_epoch_shows_every_image_once():
    length = 360
    epochs = torch.cat([y for _, y in loader(range(2 * length // 40), batch=40)])
    assert epochs[:length].bincount().equal(epochs[length:].bincount())
    assert not epochs[:length].equal(epochs[length:])


def test_loading_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    loader(range(1)).loader.dataset[(0, 0)]
    assert torch.equal(state, torch.get_rng_state())


def test_eval_transform_crops_the_centre():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    assert (eval_transform(20, (0.0,) * 3, (1.0,) * 3)(image) == 1).all()
