"""Order: sorting, keeping, resampling, and what it refuses."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

from timm_collapse.order import (
    CollapseError,
    Order,
    bayer_ranks,
    check_grid,
    check_images,
    jitter_order,
    mix_random,
    spearman,
)
from timm_collapse.order.resampling import places_before_spreading


def random_order(images=3, grid=(14, 14), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Order(torch.rand(images, grid[0] * grid[1], generator=generator), grid)


def test_indices_and_ranks_by_hand():
    order = Order(torch.tensor([[0.1, 0.9, -2.0, 0.5, 0.9, 0.1]]), (2, 3))
    assert order.indices.tolist() == [[1, 4, 3, 0, 5, 2]]  # ties in row-major order
    assert order.ranks.tolist() == [[3, 0, 5, 2, 1, 4]]
    assert (order.grid, order.num_patches, len(order)) == ((2, 3), 6, 1)
    assert order.indices is order.indices and order.ranks is order.ranks


def test_equal_scores_are_raster_order():
    assert torch.equal(Order(torch.zeros(2, 35), (5, 7)).indices, torch.arange(35).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_sorts_as_its_exact_values(dtype):
    scores = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = [sorted(range(1024), key=lambda n: (-row[n], n)) for row in scores.tolist()]
    assert Order(scores, (32, 32)).indices.tolist() == expected


@pytest.mark.parametrize(
    "keep", [1, 2, 44, 196, 0.001, 0.01, 0.22, 0.5, 1.0, np.int64(50), np.float32(0.5), torch.tensor(44)]
)
def test_keep_and_mask_against_python(keep):
    order = random_order()
    k = int(keep) if keep > 1 else max(1, round(float(keep) * 196))
    expected = [sorted(sorted(range(196), key=lambda n: -row[n])[:k]) for row in order.scores.tolist()]
    assert order.keep(keep).tolist() == expected
    assert [[n for n in range(196) if row[n]] for row in order.mask(keep).tolist()] == expected
    assert order.keep(keep).dtype == torch.long and order.mask(keep).dtype == torch.bool


def test_from_indices_and_from_ranks_round_trip():
    order = random_order()
    for copied in (Order.from_indices(order.indices, order.grid), Order.from_ranks(order.ranks, order.grid)):
        assert torch.equal(copied.indices, order.indices) and torch.equal(copied.ranks, order.ranks)
        assert torch.equal(Order(copied.scores, order.grid).ranks, order.ranks)
        assert copied.scores.max() == 1 and copied.scores.min() == pytest.approx(1 / 196)


def test_from_indices_scores_by_hand():
    assert Order.from_indices(torch.tensor([[2, 0, 3, 1]]), (2, 2)).scores.tolist() == [[0.75, 0.25, 1.0, 0.5]]


@pytest.mark.parametrize("build", [Order.from_indices, Order.from_ranks])
@pytest.mark.parametrize("row", [[0, 1, 1, 3], [1, 2, 3, 4], [-1, 0, 1, 2]])
def test_no_permutation_is_refused_by_row(build, row):
    with pytest.raises(CollapseError, match="each of 0..3 once.* in row 1"):
        build(torch.tensor([[0, 1, 2, 3], row]), (2, 2))


@pytest.mark.parametrize("item, rows", [
    (1, [1]), (-1, [3]), (np.int64(0), [0]), (np.uint8(2), [2]), (torch.tensor(2), [2]), (np.array(2), [2]),
    (slice(1, 3), [1, 2]), (slice(None, None, 2), [0, 2]), (slice(4, 9), []),
    (slice(np.int64(1), torch.tensor(3)), [1, 2]),
    (torch.tensor([3, 0]), [3, 0]), (torch.tensor([-1, 0], dtype=torch.int32), [3, 0]), (np.array([3, 0]), [3, 0]),
    (torch.tensor([2], dtype=torch.uint8), [2]), ([3, 3, 0], [3, 3, 0]), (range(1, 3), [1, 2]), ([], []),
    (torch.empty(0, dtype=torch.long), []), (torch.tensor([True, False, False, True]), [0, 3]),
    (np.array([False] * 4), []), ([True, False, True, False], [0, 2]),
])  # fmt: skip
@pytest.mark.parametrize("cached", [True, False])
def test_indexing_is_torchs_along_the_batch_and_keeps_that_dimension(item, rows, cached):
    order = random_order(images=4)
    if cached:
        order.ranks  # noqa: B018  computed before: must be indexed as well
    part = order[item]
    assert torch.equal(part.scores, order.scores[rows]) and part.grid == order.grid and len(part) == len(rows)
    assert torch.equal(part.ranks, order.ranks[rows]) and torch.equal(part.indices, order.indices[rows])


def test_iterating_gives_orders_of_one_image():
    order = random_order(images=4)
    assert [len(one) for one in order] == [1, 1, 1, 1]
    for item in (4, -5, np.int64(4), torch.tensor(4), [0, 4]):
        with pytest.raises(IndexError):
            order[item]


@pytest.mark.parametrize("item", [
    (slice(None), slice(2)), (0, 1), (0,), None, ..., True, 1.0, "0", slice(None, None, -1), torch.tensor([[0, 1]]),
    torch.tensor(True), torch.tensor([True, False]), torch.ones(4, 196, dtype=torch.bool), torch.tensor([0.0]),
    np.ones((1, 1), dtype=int), [[0], [1]],
])  # fmt: skip
def test_what_does_not_index_the_batch_is_refused_at_once(item):
    with pytest.raises(CollapseError, match=r"^an Order of 4 images must be indexed along the batch alone, .*got "):
        random_order(images=4)[item]


def test_a_batch_of_no_images():
    order = random_order(images=0)
    assert len(order) == 0 and list(order) == [] and len(order[:2]) == len(order[order.scores.sum(1) > 0]) == 0
    for part in (order, order.reversed(), copy.deepcopy(order), Order.cat([order, order]), order.resample((14, 14)),
                 Order.from_indices(order.indices, order.grid), Order.from_ranks(order.ranks, order.grid),
                 Order.with_spread_ties(order.scores, order.grid), jitter_order(order, 0.1, torch.rand(0, 196)),
                 mix_random(order, 0.5, torch.rand(0, 197))):  # fmt: skip
        assert part.ranks.shape == part.indices.shape == part.scores.shape == (0, 196)
        assert part.keep(0.5).shape == (0, 98) and part.mask(50).shape == (0, 196) and part.first(1).shape == (0, 1)
    for grid in ((28, 28), (7, 7), (7, 28), (5, 9)):
        assert order.resample(grid, spread=0.3).ranks.shape == (0, grid[0] * grid[1])
    one = random_order(images=2)
    assert torch.equal(Order.cat([order, one]).ranks, one.ranks)
    for other in (order, one[0]):
        assert spearman(order, other).shape == spearman(other, order).shape == (0,)


def test_devices_do_not_mix():
    order = random_order(images=1)
    for call in (Order.cat, lambda pair: spearman(*pair)):
        with pytest.raises(CollapseError, match="on one device, got .*cpu.*meta"):
            call([order, order.to("meta")])


def test_threads_share_an_order():
    order, expected = random_order(images=64), random_order(images=64)
    expected_kept, wrong = expected.keep(0.3), []

    def work():
        for _ in range(20):
            fresh = order[:]  # nothing is computed yet
            wrong.extend(not torch.equal(each.keep(0.3), expected_kept) for each in (fresh, order))
            wrong.append(not torch.equal(fresh.ranks, expected.ranks))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 20 * 3 and not any(wrong)


@pytest.mark.filterwarnings("ignore")
def test_an_order_that_a_graph_uses_keeps_nothing_of_the_graph():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.order = random_order(images=2, grid=(4, 4))

        def forward(self, x):
            return x.gather(1, self.order.keep(0.5)), self.order.ranks

    x = torch.rand(2, 16)
    for make in (
        lambda module: torch.export.export(module, (x,), strict=False).module(),
        lambda module: torch.export.export(module, (x,), strict=True).module(),
        lambda module: torch.jit.trace(module, (x,)),  # runs twice to compare
        lambda module: torch.compile(module, backend="eager", fullgraph=True),
    ):
        module = Module()
        assert all(map(torch.equal, make(module)(x), Module()(x)))
        assert type(module.order.ranks) is torch.Tensor and all(map(torch.equal, module(x), Module()(x)))


def test_unchecked_reads_no_value():
    scores = torch.full((1, 4), float("nan"))
    assert Order.unchecked(scores, (2, 2)).scores is scores
    meta = Order.unchecked(torch.empty(2, 16, device="meta"), (4, 4))
    for order in (
        meta,
        meta[0],
        meta.reversed(),
        meta.resample((8, 8)),
        meta.resample((2, 2)),
        Order.cat([meta, meta]),
    ):
        assert order.keep(0.5).is_meta and order.ranks.is_meta


def test_cat_is_the_inverse_of_indexing():
    order = random_order(images=4)
    joined = Order.cat([order[:1], order[1:3], order[3]])
    assert torch.equal(joined.scores, order.scores) and torch.equal(joined.ranks, order.ranks)
    with pytest.raises(CollapseError, match=r"\(2, 3\), \(14, 14\)"):
        Order.cat([order, random_order(grid=(2, 3))])
    with pytest.raises(CollapseError, match="at least one"):
        Order.cat([])


def test_reversed_is_exact_also_among_ties():
    order = Order(torch.tensor([[1.0, 1.0, 2.0, 1.0]]), (2, 2))
    assert order.reversed().indices.tolist() == [[3, 1, 0, 2]]
    assert torch.equal(order.reversed().reversed().ranks, order.ranks)
    assert torch.equal(Order(order.reversed().scores, (2, 2)).indices, order.indices.flip(1))


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda order: pickle.loads(pickle.dumps(order))])
def test_copies_survive_also_with_a_graph(copier):
    scores = torch.rand(2, 6, requires_grad=True) * 2
    copied = copier(Order(scores, (2, 3)))
    assert torch.equal(copied.scores, scores) and copied.grid == (2, 3) and not copied.scores.requires_grad
    assert torch.equal(copied.ranks, Order(scores, (2, 3)).ranks)


def test_immutable_and_differentiable():
    scores = torch.rand(1, 4, requires_grad=True)
    order = Order(scores, [2, 2])
    for name in ("scores", "indices", "ranks", "grid", "colour"):
        with pytest.raises(AttributeError):
            setattr(order, name, None)
    order[0].scores.sum().backward()
    assert torch.equal(scores.grad, torch.ones(1, 4))
    assert order.grid == (2, 2) and repr(order) == "Order(1 images, 2x2 patches, cpu)"


def test_to_moves_what_is_cached():
    order = random_order()
    order.ranks  # noqa: B018
    moved = order.to("meta")
    assert {moved.scores.device.type, moved.indices.device.type, moved.ranks.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("scores", "grid", "message"),
    [
        (torch.rand(4), (2, 2), r"scores .*\(B, N\), got a float32 tensor of shape \(4,\)"),
        (torch.ones(1, 4, dtype=torch.long), (2, 2), "scores .*got a int64 tensor"),
        ([[1.0, 2.0]], (1, 2), "scores .*got list"),
        (torch.rand(1, 4), (2, 3), r"grid \(2, 3\) has 6 patches, but there are 4"),
        (torch.rand(1, 4), 4, "grid .*got int 4"),
        (torch.rand(1, 4), (2, 2.0), r"grid .*got tuple \(2, 2.0\)"),
        (torch.rand(1, 4), (True, 4), r"grid .*got tuple \(True, 4\)"),
        (torch.rand(1, 4), (-2, -2), r"grid .*got tuple \(-2, -2\)"),
        (torch.tensor([[0.0], [float("nan")]]), (1, 1), "scores .*NaN in row 1"),
    ],
)
def test_wrong_orders_are_refused(scores, grid, message):
    with pytest.raises(CollapseError, match=message):
        Order(scores, grid)


def test_infinite_scores_sort():
    order = Order(torch.tensor([[0.0, float("-inf"), float("inf")]]), (1, 3))
    assert order.indices.tolist() == [[2, 0, 1]]


def test_check_images_names_the_image():
    images = torch.rand(3, 3, 8, 8)
    check_images(images)
    images[1, 2, 3, 4] = float("nan")
    with pytest.raises(CollapseError, match="index 1$"):
        check_images(images)
    images[2, 0, 0, 0] = float("inf")
    with pytest.raises(CollapseError, match="index 1, 2$"):
        check_images(images)
    with pytest.raises(CollapseError, match="uint8.*normalise"):
        check_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    check_images(torch.rand(0, 3, 8, 8))  # a batch of no images is a batch, as everywhere in torch
    for shape in [(3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 0), (1, 3, 0, 8)]:
        with pytest.raises(CollapseError, match="images .*got a float32 tensor") as error:
            check_images(torch.rand(shape))
        assert str(shape) in str(error.value)


def test_check_grid_accepts_what_holds_two_ints():
    assert check_grid([2, 3], 6) == check_grid(torch.Size([2, 3])) == (2, 3)


# ---- resampling


def reference_resample(ranks, old, new, spread=0.0):
    """Slow and by the definition, for one image and one direction: finer or coarser along both axes."""
    (h, w), (nh, nw) = old, new
    tie = bayer_ranks(new).tolist()
    keys, parts = [], {}
    for y in range(nh):
        for x in range(nw):
            if nh >= h and nw >= w:
                parts.setdefault(int((y + 0.5) * h / nh) * w + int((x + 0.5) * w / nw), []).append(tie[y * nw + x])
    for y in range(nh):
        for x in range(nw):
            if nh >= h and nw >= w:
                parent = int((y + 0.5) * h / nh) * w + int((x + 0.5) * w / nw)
                place = sorted(parts[parent]).index(tie[y * nw + x]) / len(parts[parent])
                value = round(((1 - spread) * ranks[parent] / (h * w) + spread * place) * 2**30)
            else:
                covered = [
                    ranks[i * w + j]
                    for i in range(y * h // nh, -(-(y + 1) * h // nh))
                    for j in range(x * w // nw, -(-(x + 1) * w // nw))
                ]
                value = sum(covered) / len(covered)
            keys.append((value, tie[y * nw + x]))
    return sorted(range(nh * nw), key=lambda n: keys[n])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((14, 14), (28, 28)),
        ((7, 5), (16, 11)),
        ((4, 4), (4, 9)),
        ((28, 28), (14, 14)),
        ((6, 8), (3, 4)),
        ((1, 9), (1, 3)),
    ],
)
def test_resample_against_the_definition(old, new):
    order = random_order(grid=old)
    expected = [reference_resample(row, old, new) for row in order.ranks.tolist()]
    assert order.resample(new).indices.tolist() == expected


def test_equal_scores_can_come_coarse_to_fine():
    equal = Order.with_spread_ties(torch.ones(2, 64), (8, 8))
    assert torch.equal(equal.ranks[1], bayer_ranks((8, 8)))
    scores = torch.rand(3, 35)
    assert torch.equal(Order.with_spread_ties(scores, (5, 7)).ranks, Order(scores, (5, 7)).ranks)
    noisy = torch.ones(1, 64) + 1e-7 * torch.rand(1, 64)
    noisy[0, 9] = 1.1
    ranks = Order.with_spread_ties(noisy, (8, 8)).ranks[0]
    others = torch.arange(64) != 9
    assert ranks[9] == 0 and torch.equal(ranks[others].argsort(), equal.ranks[0][others].argsort())
    with pytest.raises(CollapseError, match="finite"):
        Order.with_spread_ties(torch.full((1, 4), float("inf")), (2, 2))


@pytest.mark.parametrize("spread", [0.25, 0.4, 1.0])
@pytest.mark.parametrize(("old", "new"), [((5, 3), (10, 6)), ((3, 4), (11, 13)), ((4, 4), (4, 9))])
def test_spread_against_the_definition(old, new, spread):
    order = random_order(grid=old)
    expected = [reference_resample(row, old, new, spread) for row in order.ranks.tolist()]
    assert order.resample(new, spread).indices.tolist() == expected


def test_spread_is_between_the_old_order_and_covering():
    order = random_order(grid=(8, 8))
    fine = order.resample((32, 32), 1.0)
    parent = lambda n: n // 32 // 4 * 8 + n % 32 // 4  # noqa: E731
    for row in fine.indices[:, :64]:  # one part of every old patch
        assert sorted(parent(row).tolist()) == list(range(64))
    areas = [len(set(parent(order.resample((32, 32), s).indices[0, :64]).tolist())) for s in (0, 0.2, 0.5, 1)]
    assert areas[0] == 4 and areas == sorted(areas) and areas[3] == 64 and areas[1] < areas[2] < 64
    assert order.resample((4, 4), 0.7).ranks.equal(order.resample((4, 4)).ranks)  # coarser: nothing to spread
    for wrong in (-0.1, 1.1, "much", True, float("nan")):
        with pytest.raises(CollapseError, match=r"spread must be in \[0, 1\], got"):
            order.resample((16, 16), wrong)


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_places_that_decide_after_spreading(spread):
    order = random_order(grid=(14, 14))
    for h, w in ((56, 56), (16, 16), (25, 14), (14, 40)):
        for places in (1, h * w // 300 + 1, h * w // 30, h * w // 4, h * w):
            first = order.resample((h, w), spread).indices[:, :places]
            row, column = ((2 * at + 1) * 14 // (2 * side) for at, side in ((first // w, h), (first % w, w)))
            needed = int(order.ranks.gather(1, row * 14 + column).max()) + 1
            enough = places_before_spreading(places, (h, w), (14, 14), spread)
            assert needed <= enough
            if (h, w) == (56, 56):
                assert enough <= 2 * needed + 14


def test_resample_uneven_coarser_is_the_mean_of_the_widened_window():
    order = random_order(grid=(16, 16))
    means = torch.nn.functional.adaptive_avg_pool2d(order.ranks.double().view(-1, 16, 16), (14, 14)).flatten(1)
    ranks = order.resample((14, 14)).ranks
    assert (means.gather(1, ranks.argsort(1)).diff(dim=1) >= -1e-3).all()


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("keep", [0.05, 0.22, 0.5, 0.9])
def test_finer_order_keeps_the_same_area(factor, keep):
    order = random_order()
    fine = order.resample((14 * factor, 14 * factor))
    kept = fine.mask(keep).view(3, 14, factor, 14, factor).float().mean(dim=(2, 4)).flatten(1)
    assert ((kept - order.mask(keep).float()).abs().sum(dim=1) <= 1 + 1e-5).all()  # to one coarse patch
    coarse = torch.nn.functional.interpolate(order.mask(keep).view(3, 1, 14, 14).float(), scale_factor=factor)
    count = int(order.mask(keep)[0].sum()) * factor**2  # and exactly, for the same number of whole coarse patches
    assert torch.equal(fine.mask(count), coarse.flatten(1).bool())


def test_inside_a_coarse_patch_the_finer_order_is_spread():
    first = Order.from_ranks(torch.tensor([[0]]), (1, 1)).resample((8, 8)).indices[0, :4]
    corners = {(int(n) // 8 // 4, int(n) % 8 // 4) for n in first}
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_finer_and_back_is_the_same_order():
    order = random_order(grid=(7, 5))
    assert torch.equal(order.resample((21, 10)).resample((7, 5)).ranks, order.ranks)
    assert torch.equal(order.resample((7, 15)).resample((7, 5)).ranks, order.ranks)


def test_mixed_directions_take_the_coarser_axis_first():
    order = random_order(grid=(4, 6))
    mixed = order.resample((2, 12))
    assert torch.equal(mixed.ranks, order.resample((2, 6)).resample((2, 12)).ranks)
    assert torch.equal(mixed.ranks.sort(dim=1).values, torch.arange(24).expand(3, -1))


def test_resample_to_the_same_grid_is_the_same_object():
    order = random_order()
    assert order.resample([14, 14]) is order
    with pytest.raises(CollapseError, match="grid"):
        order.resample((0, 14))


def test_resample_to_pixels_is_a_permutation_of_50176():
    fine = random_order(images=2).resample((224, 224))
    assert torch.equal(fine.indices.sort(dim=1).values, torch.arange(50176).expand(2, -1))
    assert torch.equal(Order(fine.scores, fine.grid).ranks, fine.ranks)  # float32 scores still tell all ranks apart
    assert torch.equal(fine.resample((14, 14)).ranks, random_order(images=2).ranks)


def test_compiles_and_exports_without_a_break():
    class Module(torch.nn.Module):
        def forward(self, scores):
            order = Order(scores, (4, 4))
            return order.keep(0.22), order.mask(3), order[0].reversed().ranks, order.resample((8, 8)).indices

    scores = random_order(grid=(4, 4)).scores
    expected = Module()(scores)
    for module in (
        torch.compile(Module(), backend="eager", fullgraph=True),
        torch.export.export(Module(), (scores,)).module(),
    ):
        assert all(map(torch.equal, module(scores), expected))
