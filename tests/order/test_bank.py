"""The bank of class orders: what it keeps of the orders that it saw, and what it draws."""

import pytest
import torch
from safetensors.torch import save_file

from timm_collapse import ClassOrderBank, CollapseError, Order
from timm_collapse.order import spearman

GRID = (2, 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orders_of(images, grid=GRID, seed=0):
    return Order.from_indices(torch.rand(images, grid[0] * grid[1], generator=generator(seed)).argsort(1), grid)


def build(images=60, classes=4, grid=GRID, **kwargs):
    """A bank of random orders of random labels, and these."""
    order, labels = orders_of(images, grid), torch.randint(classes, (images,), generator=generator(1))
    return ClassOrderBank.build([(order, labels)], classes, **kwargs), order, labels


def held(bank, label):
    return [tuple(row) for row in bank.ranks[label, : bank.counts[label]].tolist()]


def test_means_are_of_all_images_and_held_orders_are_some_of_them():
    bank, order, labels = build(images=200, per_class=7)
    assert bank.num_classes == 4 and bank.grid == GRID and bank.num_patches == 6 and bank.ranks.shape == (4, 7, 6)
    for label in range(4):
        own = order.ranks[labels == label]
        expected = sum((6 - row.double()) / 6 for row in own) / len(own)
        assert torch.allclose(bank.means[label].double(), expected, atol=1e-7)
        assert bank.seen[label] == len(own) > bank.counts[label] == 7
        assert set(held(bank, label)) <= {tuple(row) for row in own.tolist()}
        assert torch.equal(
            bank.sample(torch.tensor([label]), source="mean").indices[0],
            expected.float().argsort(descending=True, stable=True),
        )


def test_classes_with_fewer_images_keep_them_all():
    order, labels = orders_of(5), torch.tensor([0, 3, 3, 0, 3])
    bank = ClassOrderBank.build([(order, labels)], 4, per_class=100)
    assert bank.counts.tolist() == bank.seen.tolist() == [2, 0, 0, 3] and bank.ranks.shape == (4, 3, 6)
    assert held(bank, 3) == [tuple(row) for row in order.ranks[labels == 3].tolist()]
    with pytest.raises(CollapseError, match=r"labels: the bank has no orders of the classes \[1, 2\]"):
        bank.sample(torch.tensor([0, 2, 1]))
    with pytest.raises(CollapseError, match=r"no orders of the classes \[1\]"):
        bank.sample(torch.tensor([1]), source="mean")


def test_the_held_sample_is_uniform_over_the_stream_and_the_seed_decides():
    order, labels = orders_of(12), torch.zeros(12, dtype=torch.long)
    rows = {tuple(row): i for i, row in enumerate(order.ranks.tolist())}
    counts = torch.zeros(12)
    assert len(rows) == 12
    for seed in range(1000):
        for row in held(ClassOrderBank.build([(order, labels)], 1, per_class=3, seed=seed), 0):
            counts[rows[row]] += 1
    assert (counts / 1000 - 0.25).abs().max() < 4 * (0.25 * 0.75 / 1000) ** 0.5  # four standard errors


def test_batches_do_not_matter():
    bank, order, labels = build(images=150, per_class=5, seed=3)
    parts = ((order[i : i + 7], labels[i : i + 7].int()) for i in range(0, 150, 7))
    split = ClassOrderBank.build(parts, 4, per_class=5, seed=3)
    assert all(torch.equal(getattr(bank, name), getattr(split, name)) for name in ("ranks", "means", "seen"))
    other = ClassOrderBank.build([(order, labels)], 4, per_class=5, seed=4)
    assert not torch.equal(bank.ranks, other.ranks) and torch.equal(bank.means, other.means)


def test_sampling_gives_each_held_order_of_the_class_equally_often():
    order, labels = orders_of(7), torch.tensor([0, 1, 1, 1, 1, 2, 2])
    bank = ClassOrderBank.build([(order, labels)], 3)
    drawn = bank.sample(torch.tensor([1, 2]).repeat(4000), generator())
    for start, rows in ((0, order.ranks[1:5]), (1, order.ranks[5:])):
        share = torch.stack([(drawn.ranks[start::2] == row).all(1).float().mean() for row in rows])
        assert (share - 1 / len(rows)).abs().max() < 4 * (0.25 / 4000) ** 0.5
        assert abs(share.sum() - 1) < 1e-6  # and nothing else
    again = bank.sample(torch.tensor([1, 2]).repeat(4000), generator())
    assert torch.equal(drawn.indices, again.indices)


def test_mean_source_is_plackett_luce_around_the_mean_order():
    bank, _, _ = build(images=200)
    labels = torch.tensor([2]).repeat(20_000)
    assert torch.equal(
        bank.sample(labels[:3], source="mean").indices,
        bank.sample(torch.tensor([2]), source="mean").indices.expand(3, -1),
    )
    first = bank.sample(labels, generator(), "mean", temperature=0.5).indices[:, 0]
    weights = torch.exp(-bank.sample(torch.tensor([2]), source="mean").ranks[0] / (0.5 * 6))
    share = first.bincount(minlength=6) / 20_000
    assert (share - weights / weights.sum()).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_jitter_goes_from_the_order_itself_to_random():
    order = Order.from_ranks(torch.arange(64)[None], (8, 8))
    bank = ClassOrderBank.build([(order, torch.tensor([0]))], 1)
    labels = torch.zeros(200, dtype=torch.long)
    for source in ("bank", "mean"):
        agree = [spearman(bank.sample(labels, generator(), source, t), order).mean() for t in (0, 1e-4, 0.1, 1.0, 1e4)]
        assert agree[0] == agree[1] == 1 > agree[2] > agree[3] > agree[4] and abs(agree[4]) < 0.04


def test_without_classes():
    order = orders_of(4)
    bank = ClassOrderBank.build([(order, None)], 1)
    assert bank.seen.tolist() == [4] and len(bank.sample(None)) == 1
    assert len(bank.sample(torch.zeros(9, dtype=torch.long))) == 9
    with pytest.raises(CollapseError, match="labels may be None only for a bank of one class, this one has 4"):
        build()[0].sample(None)


def test_shuffled_gives_every_class_the_orders_of_another():
    for seed in range(30):
        bank, _, _ = build(classes=5)
        shuffled = bank.shuffled(seed)
        origin = [[held(bank, b) for b in range(5)].index(held(shuffled, a)) for a in range(5)]
        assert sorted(origin) == list(range(5)) and all(a != b for a, b in enumerate(origin))
        assert torch.equal(shuffled.means, bank.means[origin]) and torch.equal(shuffled.seen, bank.seen[origin])
    assert torch.equal(bank.shuffled(1).ranks, bank.shuffled(1).ranks)
    with_gaps = ClassOrderBank.build([(orders_of(2), torch.tensor([1, 3]))], 5).shuffled(0)
    assert with_gaps.seen.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(CollapseError, match="at least two classes to shuffle, got 1"):
        ClassOrderBank.build([(orders_of(2), torch.tensor([1, 1]))], 3).shuffled(0)


@pytest.mark.parametrize("grid", [GRID, (17, 16)])
def test_reversed(grid):
    bank, order, labels = build(images=40, grid=grid)
    expected = ClassOrderBank.build([(order.reversed(), labels)], 4)
    found = bank.reversed()
    assert torch.equal(found.ranks[0, : found.counts[0]], expected.ranks[0, : expected.counts[0]])
    assert torch.allclose(found.means, expected.means, atol=1e-6) and found.ranks.dtype == bank.ranks.dtype
    empty = ClassOrderBank.build([(orders_of(2), torch.tensor([1, 1]))], 2).reversed()
    assert not empty.means[0].any()


@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (20, 30)])
def test_resample_is_that_of_every_order(grid):
    bank, order, labels = build(images=40)
    found = bank.resample(grid)
    assert found.grid == grid and bank.resample(GRID) is bank
    assert found.ranks.dtype == (torch.uint8 if grid[0] < 20 else torch.int32)
    for label in range(4):
        own = order[labels == label].resample(grid).ranks
        assert torch.equal(found.ranks[label, : len(own)].long(), own)
        assert torch.equal(
            found.sample(torch.tensor([label]), source="mean").indices,
            bank.sample(torch.tensor([label]), source="mean").resample(grid).indices,
        )


@pytest.mark.parametrize("grid", [GRID, (16, 16), (16, 17)])
def test_save_and_load(tmp_path, grid):
    bank, _, _ = build(grid=grid, source="made by a test")
    bank.save(tmp_path / "new" / "bank.safetensors")
    loaded = ClassOrderBank.load(tmp_path / "new" / "bank.safetensors")
    assert loaded.grid == grid and loaded.source == "made by a test" and repr(loaded) == repr(bank)
    assert all(torch.equal(getattr(bank, name), getattr(loaded, name)) for name in ("ranks", "means", "seen"))
    assert loaded.ranks.dtype == (torch.uint8 if grid != (16, 17) else torch.int32)
    labels = torch.tensor([0, 3, 1])
    assert torch.equal(bank.sample(labels, generator()).indices, loaded.sample(labels, generator()).indices)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    bank, _, _ = build()
    tensors = {"ranks": bank.ranks, "means": bank.means, "seen": bank.seen}
    good = {"format": "timm-collapse class order bank", "version": "1", "grid": "2 3", "source": ""}
    save_file(tensors, path, metadata=good)
    ClassOrderBank.load(path)
    for metadata, message in (
        (None, "must be a bank that ClassOrderBank.save wrote"),
        ({**good, "format": "x"}, "must be a bank that ClassOrderBank.save wrote"),
        ({**good, "version": "2"}, "has format version '2', this package reads '1'"),
        ({**good, "grid": "2 4"}, "damaged: ranks must be torch.uint8 of shape"),
        ({**good, "grid": "two 3"}, "damaged"),
        ({k: v for k, v in good.items() if k != "grid"}, "damaged"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CollapseError, match=f"path: .*bank.safetensors.*{message}"):
            ClassOrderBank.load(path)
    for name, wrong, message in (
        ("ranks", bank.ranks.clamp(max=4), "ranks must hold each of 0..5 once in every row, not so in class 0"),
        ("ranks", bank.ranks + 1, "ranks must hold each of 0..5"),
        ("ranks", bank.ranks.int(), "ranks must be torch.uint8"),
        ("means", bank.means / 0, "means must be finite float32"),
        ("means", bank.means[:3], r"means must be finite float32 of shape \(4, 6\)"),
        ("seen", bank.seen - 1000, "seen must be"),
        ("seen", bank.seen * 0, "seen must be"),
    ):
        save_file({**tensors, name: wrong}, path, metadata=good)
        with pytest.raises(CollapseError, match=f"damaged: {message}"):
            ClassOrderBank.load(path)
    save_file({"ranks": bank.ranks}, path, metadata=good)
    with pytest.raises(CollapseError, match="damaged: .*means"):
        ClassOrderBank.load(path)
    for garbage in (b"", b"not a bank" * 50):
        path.write_bytes(garbage)
        with pytest.raises(CollapseError, match="is no class order bank"):
            ClassOrderBank.load(path)
    with pytest.raises(OSError):
        ClassOrderBank.load(tmp_path / "missing.safetensors")


def test_wrong_input():
    order, labels = orders_of(3), torch.tensor([0, 4, 1])
    with pytest.raises(CollapseError, match=r"labels must be in \[0, 3\], got 4 at index 1"):
        ClassOrderBank.build([(order, labels)], 4)
    with pytest.raises(CollapseError, match="labels must be one an order, got 2 for 3 orders"):
        ClassOrderBank.build([(order, labels[::2])], 4)
    with pytest.raises(CollapseError, match=r"orders must share one grid, got \(2, 3\) and \(3, 2\)"):
        ClassOrderBank.build([(order, labels), (orders_of(3, (3, 2)), labels)], 5)
    with pytest.raises(CollapseError, match="orders must hold at least one batch"):
        ClassOrderBank.build([], 4)
    for wrong in ({"num_classes": 0}, {"num_classes": 2.0}, {"per_class": 0}, {"per_class": True}, {"seed": -1}):
        with pytest.raises(CollapseError, match=f"{next(iter(wrong))} must be an int of at least"):
            ClassOrderBank.build([(order, labels)], **{"num_classes": 5, **wrong})
    bank = build()[0]
    with pytest.raises(CollapseError, match=r"labels must be in \[0, 3\], got -1 at index 2"):
        bank.sample(torch.tensor([0, 1, -1]))
    with pytest.raises(CollapseError, match=r"labels must be in \[0, 3\], got 4 at index 0"):
        bank.sample(torch.tensor([4]), source="mean")
    with pytest.raises(CollapseError, match="labels must be a long tensor"):
        bank.sample(torch.zeros(2))
    with pytest.raises(CollapseError, match="source must be one of bank, mean, got 'text'"):
        bank.sample(torch.tensor([0]), source="text")
    with pytest.raises(CollapseError, match="temperature must be at least 0, got -1"):
        bank.sample(torch.tensor([0]), temperature=-1)
    with pytest.raises(CollapseError, match="grid must be two positive ints"):
        bank.resample((0, 3))
