"""`timm-collapse order-bank`: the bank that it writes, its picture, and that every failure is one line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from timm_collapse import ClassOrderBank, CollapseError, CollapseOrder, Order
from timm_collapse.cli.main import build_parser
from timm_collapse.data import eval_transform, labels_of, open_dataset
from timm_collapse.plots import plot_bank


def command(*argv):
    args = build_parser().parse_args([str(argument) for argument in argv])
    args.command.run(args)


@pytest.fixture
def run(here, capsys):
    """Runs the command on digits in an empty folder; returns stdout."""

    def run(*argv):
        command("order-bank", "--dataset", "digits", "--workers", 0, "--device", "cpu", *argv)
        return capsys.readouterr().out

    return run


def reference(split, part="", mirror=True, img_size=64, grid=(4, 4), every=1):
    """All orders of the baseline variance and their labels, image by image."""
    dataset = open_dataset("digits", split, part).dataset
    transform, orderer = eval_transform(img_size, (0.5,) * 3, (0.5,) * 3), CollapseOrder.baseline("variance")
    images = torch.stack([transform(dataset[i][0]) for i in range(0, len(dataset), every)])
    labels = torch.from_numpy(labels_of(dataset)[::every])
    orders = [orderer(view, grid=grid) for view in ((images, images.flip(-1)) if mirror else (images,))]
    return Order.cat(orders), labels.repeat(len(orders))


def assert_bank_of(bank, order, labels):
    """All of the orders, each held: the means are the same, and so are the held orders, in any sequence."""
    expected = ClassOrderBank.build([(order, labels)], 10, per_class=10_000)
    assert bank.grid == expected.grid and torch.equal(bank.seen, expected.seen)
    assert torch.equal(bank.means, expected.means)
    for label, count in enumerate(bank.counts.tolist()):
        rows = [sorted(each.ranks[label, :count].tolist()) for each in (bank, expected)]
        assert rows[0] == rows[1]


def test_a_bank_of_digits_with_its_picture(run):
    out = run("--orderer", "variance", "--split", "validation", "--grid", 4, 4, "--output", "a.safetensors",
              "--per-class", 999, "--batch-size", 50, "--plot", "a.png")  # fmt: skip
    bank = ClassOrderBank.load("a.safetensors")
    assert_bank_of(bank, *reference("validation"))
    assert bank.source == "digits validation, 360 images, mirrored, by variance"
    assert "720 orders of 4 x 4 patches, 10 classes" in out and "bank: a.safetensors" in out and "picture: a.png" in out
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "a.safetensors"]


def test_parts_images_sizes_and_mirror(run):
    common = ["--orderer", "variance", "--split", "validation", "--grid", 2, 4]
    run(*common, "--no-mirror", "--images", 180, "--img-size", 32, "--per-class", 999)
    assert_bank_of(
        ClassOrderBank.load("bank.safetensors"),
        *reference("validation", mirror=False, img_size=32, grid=(2, 4), every=2),
    )
    run(*common, "--part", "1/4", "--per-class", 3, "--output", "part.safetensors")
    bank = ClassOrderBank.load("part.safetensors")
    assert bank.counts.max() == 3 and bank.seen.sum() == 180
    order, labels = reference("validation", "1/4", grid=(2, 4))
    assert torch.equal(bank.means, ClassOrderBank.build([(order, labels)], 10).means)


def test_the_ranker_is_the_default_and_precision_changes_little(run):
    run("--images", 20, "--output", "a.safetensors", "--no-mirror")
    run("--images", 20, "--output", "b.safetensors", "--no-mirror", "--precision", "bf16")
    full, half = (ClassOrderBank.load(f"{name}.safetensors") for name in "ab")
    assert full.grid == (8, 8) and full.source.endswith("by collapse_ranker_tiny")
    dataset = open_dataset("digits", "train").dataset
    orderer = CollapseOrder.from_pretrained("collapse_ranker_tiny")
    image = eval_transform(64, orderer.mean, orderer.std)(dataset[0][0])
    assert full.ranks[dataset[0][1], 0].tolist() == orderer(image[None]).ranks[0].tolist()
    filled = full.seen > 0
    assert np.corrcoef(full.means[filled].flatten(), half.means[filled].flatten())[0, 1] > 0.9


@pytest.fixture
def table(tmp_path):
    """The orders of digits' validation split, as order-dataset writes them."""
    order_dataset(tmp_path / "table", "--split", "validation")
    return tmp_path / "table"


def order_dataset(folder, *argv):
    quick = ["--dataset", "digits", "--workers", 0, "--device", "cpu", "--orderer", "variance", "--grid", 4, 4]
    command("order-dataset", *quick, "--output", folder, *argv)


def test_an_order_table_gives_the_same_bank(run, table):
    common = ["--split", "validation", "--order-table", table, "--per-class", 999]
    run(*common)
    bank = ClassOrderBank.load("bank.safetensors")
    assert_bank_of(bank, *reference("validation")) and str(table.parent) not in bank.source
    assert bank.source == "digits validation, 360 images, mirrored, by variance"
    run(*common, "--no-mirror", "--images", 180, "--grid", 8, 8, "--batch-size", 77)
    order, labels = reference("validation", mirror=False, every=2)
    assert_bank_of(ClassOrderBank.load("bank.safetensors"), order.resample((8, 8)), labels)


def test_an_order_table_needs_no_data_set(table, tmp_path):
    out = str(tmp_path / "bank.safetensors")
    command("order-bank", "--order-table", table, "--per-class", 999, "--output", out)
    bank = ClassOrderBank.load(out)
    assert_bank_of(bank, *reference("validation"))
    assert bank.source == "digits validation, 360 images, mirrored, by variance"
    with pytest.raises(CollapseError, match="--dataset must be given, or --order-table"):
        command("order-bank", "--output", out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--orderer", "bayer"], "--grid must be given for the baseline 'bayer'"),
        (["--orderer", "nonsense"], "'nonsense' is neither"),
        (["--ranking", "coverage"], "ranking is for a CoMAE's dependency graph"),
        (["--grid", "0", "4"], "grid must be two positive ints"),
        (["--images", "-1"], "--images must be at least 0, got -1"),
        (["--per-class", "0"], "--per-class must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--img-size", "0"], "--img-size must be at least 1"),
        (["--split", "third"], "split: digits has train and validation"),
        (["--part", "5/3"], "part: expected 'i/n'"),
        (["--plot", "a.jpg"], "--plot must end in .png, .pdf, .svg, got 'a.jpg'"),
        (["--plot", "none/a.png"], "the folder 'none' does not exist"),
        (["--output", "none/a.safetensors"], "the folder 'none' does not exist"),
        (["--order-table", "x", "--orderer", "bayer"], "--orderer must not be given with --order-table, got 'bayer'"),
        (["--order-table", "x", "--img-size", "32"], "--img-size must not be given with --order-table"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    with pytest.raises(CollapseError) as error:
        run(*arguments)
    assert message in str(error.value) and not list(Path().iterdir())


def test_wrong_tables(run, table, tmp_path):
    with pytest.raises(CollapseError, match=r"order_table: .* orders of 360 images, the data set has 1437"):
        run("--order-table", table)
    run("--orderer", "bayer", "--grid", 2, 2, "--images", 10)
    with pytest.raises(CollapseError, match="order_table: bank.safetensors is no folder of orders; make it again with"):
        run("--order-table", "bank.safetensors")
    with pytest.raises(CollapseError, match="order_table: there is no folder missing"):
        run("--order-table", "missing")
    order_dataset(tmp_path / "one side", "--split", "validation", "--no-mirror")
    with pytest.raises(CollapseError, match="mirrored is False, not True"):
        run("--order-table", tmp_path / "one side", "--split", "validation")


def test_plot_draws_the_mean_ranks_of_the_first_classes():
    order, labels = Order(torch.rand(60, 6), (2, 3)), torch.arange(60) % 30
    bank = ClassOrderBank.build([(order, labels)], 30)
    figure = plot_bank(bank, [f"name {label}" for label in range(30)])
    *maps, bar = figure.axes
    assert len(maps) == 20 and [ax.get_title() for ax in maps[:2]] == ["name 0", "name 1"]
    for label, ax in enumerate(maps):
        expected = order.ranks[labels == label].float().mean(0).view(2, 3)
        np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), expected, atol=1e-5)
    assert figure.get_supxlabel() == "20 of 30 classes" and "rank" in bar.get_ylabel()
    gaps = plot_bank(ClassOrderBank.build([(order[:1], torch.tensor([3]))], 5))
    assert gaps.axes[0].get_title() == "class 3" and len(gaps.axes) == 2
    with pytest.raises(CollapseError, match="names must be one for each of the 30 classes, got 2"):
        plot_bank(bank, ["a", "b"])
