"""The table of a data set's orders that a training looks up, and what it refuses."""

import pytest
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.data import OrderedImages, OrderTable, eval_transform, open_dataset, write_orders
from timm_collapse.data.units import MapUnits
from timm_collapse.engine import order_source

TRANSFORM = eval_transform(16, (0.5,) * 3, (0.5,) * 3)


def make(folder, dataset, name="variance", grid=(4, 4), **kwargs):
    """Writes the orders of a data set; returns their source."""
    orderer = CollapseOrder.baseline(name)
    source = order_source("digits", len(dataset), (16, 16), grid, name, orderer)
    write_orders(folder, MapUnits(dataset, 7), source, orderer, lambda images: orderer(images, grid=grid), TRANSFORM,
                 quiet=True, **kwargs)  # fmt: skip
    return source


def test_table_holds_the_orders_of_images_and_mirror_images(tmp_path):
    dataset = open_dataset("digits", "validation", "0/20").dataset
    source = make(tmp_path, dataset, batch_size=5)
    table = OrderTable.load(tmp_path, {**source, "mirrored": True}, dataset)
    assert table.ranks.dtype == torch.uint8 and table.ranks.shape == (2, len(dataset), 16) and table.grid == (4, 4)
    assert table.labels.tolist() == [label for _, label in dataset] and len(table) == len(dataset)
    index, mirrored = torch.tensor([3, 0, 3, 17]), torch.tensor([False, True, True, False])
    images = torch.stack([TRANSFORM(dataset[i][0]) for i in index.tolist()])
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    expected = CollapseOrder.baseline("variance")(images, grid=(4, 4))
    assert torch.equal(table.lookup(index, mirrored).indices, expected.indices)
    batches = list(table.batches(table.labels, mirrored=True, size=10))
    assert [len(order) for order, _ in batches] == [10, 8, 10, 8]
    assert torch.equal(batches[2][0].ranks[3], table.lookup(torch.tensor([3]), torch.tensor([True])).ranks[0])
    assert batches[3][1].tolist() == table.labels[10:].tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "others"}, "dataset is 'digits', not 'others'"),
        ({"grid": (2, 8)}, r"grid is \[4, 4\], not \[2, 8\]"),
        ({"img_size": (16, 32), "weights": "0"}, r"img_size is \[16, 16\], not \[16, 32\], weights is '\w+', not '0'"),
        ({"orderer": "bayer"}, "orderer is 'variance', not 'bayer'"),
        ({"mirrored": True}, "mirrored is False, not True"),
    ],
)
def test_other_sources_are_refused(tmp_path, change, message):
    source = make(tmp_path, open_dataset("digits", "validation", "0/90").dataset, mirrored=False)
    with pytest.raises(CollapseError, match=f"order_table: .* holds other orders: {message}; choose another folder"):
        OrderTable.load(tmp_path, {**source, **change})


def test_another_data_set_is_refused(tmp_path):
    make(tmp_path, open_dataset("digits", "validation", "0/90").dataset)
    with pytest.raises(CollapseError, match="orders of 4 images, the data set has 3"):
        OrderTable.load(tmp_path, dataset=open_dataset("digits", "validation", "0/120").dataset)
    with pytest.raises(CollapseError, match="the order of '0' at index 0, where the data set has '1'"):
        OrderTable.load(tmp_path, dataset=open_dataset("digits", "validation", "1/90").dataset)


def test_a_table_without_mirror_images_has_none(tmp_path):
    dataset = open_dataset("digits", "validation", "0/90").dataset
    table = OrderTable.load(tmp_path, make(tmp_path, dataset, mirrored=False))
    assert table.ranks.shape[0] == 1
    both = torch.tensor([0, 1])
    assert len(table.lookup(both, torch.tensor([False, False]))) == 2
    for ask in (lambda: table.lookup(both, torch.tensor([False, True])), lambda: next(table.batches(table.labels))):
        with pytest.raises(CollapseError, match="order_table: has no orders of mirror images"):
            ask()


@pytest.mark.parametrize("grid, dtype", [((16, 16), torch.uint8), ((1, 257), torch.uint16), ((256, 256), torch.uint16)])
def test_ranks_have_the_smallest_type(tmp_path, grid, dtype):
    dataset = open_dataset("digits", "validation", "0/200").dataset
    table = OrderTable.load(tmp_path, make(tmp_path, dataset, "raster", grid))
    assert table.ranks.dtype == dtype
    looked_up = table.lookup(torch.tensor([1]), torch.tensor([True]))
    assert looked_up.ranks.tolist() == [list(range(grid[0] * grid[1]))]
    order, _ = next(table.batches(table.labels, mirrored=False))
    assert torch.equal(order.ranks[1], looked_up.ranks[0])


def test_more_patches_than_uint16_can_rank_are_refused(tmp_path):
    with pytest.raises(CollapseError, match=r"grid: must have at most 65536 patches, got \(257, 256\)"):
        make(tmp_path, open_dataset("digits", "validation", "0/200").dataset, "raster", (257, 256))


def test_files_and_empty_folders_are_no_tables(tmp_path):
    (tmp_path / "old.safetensors").write_bytes(b"ranks")
    (tmp_path / "empty").mkdir()
    for name in ("old.safetensors", "empty"):
        with pytest.raises(
            CollapseError, match=f"{name} is no folder of orders; make it again with `timm-collapse ord"
        ):
            OrderTable.load(tmp_path / name)
    with pytest.raises(CollapseError, match="old.safetensors is no folder of orders; make it again"):
        make(tmp_path / "old.safetensors", open_dataset("digits", "validation", "0/200").dataset)
    with pytest.raises(CollapseError, match="there is no folder .*missing; make it with"):
        OrderTable.load(tmp_path / "missing")


def test_samples_come_with_their_orders_mirrored_at_random(tmp_path):
    dataset = open_dataset("digits", "validation", "0/20").dataset
    make(tmp_path, dataset)
    ordered = OrderedImages(dataset, OrderTable.load(tmp_path), TRANSFORM)
    orderer, seen = CollapseOrder.baseline("variance"), []
    for index in [2] * 10:
        image, label, ranks = ordered[index]
        assert label == dataset[index][1] and torch.equal(ranks, orderer(image.unsqueeze(0), grid=(4, 4)).ranks[0])
        seen.append(torch.equal(image, TRANSFORM(dataset[index][0])))
    assert len(ordered) == len(dataset) and set(seen) == {True, False}
