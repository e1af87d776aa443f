import pytest
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.data import Indexed, OrderTable, eval_transform, open_dataset


def test_table_holds_the_orders_of_images_and_mirror_images(tmp_path):
    dataset = open_dataset("digits", "validation", "0/20").dataset
    transform = eval_transform(16, (0.5,) * 3, (0.5,) * 3)
    orderer = CollapseOrder.baseline("variance")

    def compute(images):
        return orderer(images, grid=(4, 4))

    table = OrderTable.build(compute, dataset, transform, "digits", batch_size=7, quiet=True)
    table.save(tmp_path / "orders.safetensors")
    table = OrderTable.load(tmp_path / "orders.safetensors", "digits")
    assert table.ranks.dtype == torch.uint8 and table.ranks.shape == (2, len(dataset), 16) and table.grid == (4, 4)
    index, mirrored = torch.tensor([3, 0, 3]), torch.tensor([False, True, True])
    images = torch.stack([transform(dataset[i][0]) for i in index.tolist()])
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    assert torch.equal(table.lookup(index, mirrored).indices, compute(images).indices)
    with pytest.raises(CollapseError, match="order_table: .* holds orders of 'digits', needed are those of 'others'"):
        OrderTable.load(tmp_path / "orders.safetensors", "others")


def test_large_grids_fit():
    def compute(images):
        return CollapseOrder.baseline("raster")(images, grid=(32, 32))

    dataset = open_dataset("digits", "validation", "0/200").dataset
    table = OrderTable.build(compute, dataset, eval_transform(32, (0.5,) * 3, (0.5,) * 3), "x", quiet=True)
    assert table.lookup(torch.tensor([1]), torch.tensor([False])).ranks.tolist() == [list(range(1024))]


def test_indexed_labels_are_positions():
    dataset = Indexed(open_dataset("digits", "validation").dataset)
    assert [dataset[i][1] for i in (0, 7)] == [0, 7] and len(dataset) == 360
