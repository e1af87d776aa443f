"""The accuracy-over-keep curve: closed forms, a model whose accuracy is known, and digits end to end."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.evaluation import KEEPS, AccuracyCurve, accuracy_curves, costs_over_keep, with_orderer
from timm_collapse.evaluation.accuracy import image_batches, plain_model
from timm_collapse.evaluation.curve import area_under_curve, find_knee
from timm_collapse.plots import plot_accuracy, plot_budgets


def tiny(**kwargs):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **kwargs}).eval()


class Known(torch.nn.Module):
    """Stands for a collapsed model: right about image i where the order of i puts patch 0 among the kept ones."""

    def __init__(self, orderer=None):
        super().__init__()
        self.keep, self.orderer, self.normalisation, self.orders = 0.5, orderer or SimpleNamespace(), None, []

    def image_grid(self, images):
        return (1, 10)

    def compute_order(self, images, upto=None):
        self.orders.append(upto)
        ranks = images.flatten(1)[:, :1].long()  # the first pixel says where patch 0 comes
        return Order.from_indices((torch.arange(10) - ranks) % 10, (1, 10))

    def forward(self, images, order=None):
        right = torch.ones(len(images), dtype=torch.bool) if order is None else order.mask(self.keep)[:, 0]
        logits = torch.arange(20, 0, -1.0).repeat(len(images), 1)  # class 0 is best, class 7 eighth
        logits[right, 7] = 100
        return logits


def known_batches(sizes=(4, 6)):
    """Image i of ten has patch 0 at place i; all labels are 7."""
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    return [(part, torch.full((len(part),), 7)) for part in images.split(sizes)]


def test_a_constant_curve_is_its_own_area_and_has_no_knee():
    assert area_under_curve(KEEPS, [80.0] * len(KEEPS)) == pytest.approx(80)
    assert find_knee(KEEPS, [80.0] * len(KEEPS)) is None
    curve = AccuracyCurve(list(KEEPS), [8] * 14, [9] * 14, 10)
    assert curve.auc == pytest.approx(80) and curve.knee is None


def test_the_area_of_piecewise_linear_curves():
    masked = [1 - keep for keep in KEEPS]
    assert area_under_curve(KEEPS, [100 * (1 - m) for m in masked]) == pytest.approx(100 * (1 - 0.99 / 2))
    # flat at 80 up to 70% masked, then straight to 0 at 99%
    bent = [80 * min(1, (0.99 - m) / 0.29) for m in masked]
    assert area_under_curve(KEEPS, bent) == pytest.approx((80 * 0.7 + 80 * 0.29 / 2) / 0.99)
    assert area_under_curve([1.0, 0.5, 0.2], [9.0, 6.0, 0.0]) == pytest.approx((7.5 * 0.5 + 3 * 0.3) / 0.8)
    assert area_under_curve([1.0], [50.0]) is None


def test_the_knee_is_where_the_curve_bends():
    for bend in (0.3, 0.22, 0.1):
        accuracy = [80 * min(1, (keep - 0.01) / (bend - 0.01)) for keep in KEEPS]
        assert find_knee(KEEPS, accuracy) == bend
    straight, hollow = [80 * keep for keep in KEEPS], [80 * keep**2 for keep in KEEPS]
    assert find_knee(KEEPS, straight) is None and find_knee(KEEPS, hollow) is None
    assert find_knee(KEEPS[:2], [80, 10]) is None and find_knee(KEEPS, straight[::-1]) is None


def test_counts_give_accuracies_and_standard_errors():
    curve = AccuracyCurve([1.0, 0.5], [90, 50], [100, 75], 100)
    assert (curve.top1, curve.top5, curve.top1_error[1]) == ([90, 50], [100, 75], pytest.approx(5))
    assert curve.top5_error == pytest.approx([0, 100 * (0.75 * 0.25 / 100) ** 0.5])
    assert curve.at(0.5) == 1 and json.loads(json.dumps(curve.to_dict()))["masked"] == [0, 0.5]
    with pytest.raises(CollapseError, match="0.7 was not measured"):
        curve.at(0.7)


def test_a_model_with_known_accuracy():
    model, keeps = Known().train(), [0.1, 1.0, 0.5, 0.3]
    curve = accuracy_curves({"known": model}, known_batches(), keeps, device="cpu", progress=False)["known"]
    assert curve.keeps == [1.0, 0.5, 0.3, 0.1] and curve.hits1 == curve.hits5 == [10, 5, 3, 1] and curve.images == 10
    assert model.orders == [5, 5]  # once a batch, as far as the largest keep needs
    assert model.keep == 0.5 and model.training


def test_top5_counts_the_five_best():
    batches = [(images, torch.tensor([4, 4, 5, 7])) for images, _ in known_batches((4, 6))[:1]]
    curve = accuracy_curves({"known": Known()}, batches, [0.1], device="cpu", progress=False)["known"]
    assert curve.hits1 == [0] and curve.hits5 == [1]  # image 0 puts class 7 first, and class 4 sixth
    curve = accuracy_curves({"known": Known()}, [(b[0][1:], b[1][1:]) for b in batches], [0.1], device="cpu",
                            progress=False)["known"]  # fmt: skip
    assert curve.hits5 == [1] and curve.images == 3


def test_orders_are_shared_between_models_with_the_same_orderer():
    orderer = SimpleNamespace()
    models = {"a": Known(orderer), "b": Known(orderer), "c": Known()}
    curves = accuracy_curves(models, known_batches(), [0.5, 0.2], device="cpu", progress=False)
    assert [len(model.orders) for model in models.values()] == [2, 0, 2]
    assert curves["a"].hits1 == curves["b"].hits1 == curves["c"].hits1 == [5, 2]


def test_no_order_is_made_where_all_patches_are_kept():
    model = Known()
    curve = accuracy_curves({"known": model}, known_batches(), [1.0], device="cpu", progress=False)["known"]
    assert curve.hits1 == [10] and model.orders == []


def digits(images=60, batch_size=25):
    from timm.data import create_transform

    from timm_collapse.data import open_dataset

    transform = create_transform(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    return image_batches(open_dataset("digits", "validation").dataset, transform, images, batch_size)


@pytest.mark.parametrize("orderer, remainder", [("collapse_ranker_tiny", "none"), ("variance", "coarse")])
def test_curves_on_digits_equal_the_model_at_each_keep(orderer, remainder):
    plain = tiny()
    model, keeps = with_orderer(plain, orderer, remainder), [1.0, 0.5, 0.22, 0.05]
    curves = accuracy_curves({"collapsed": model, "plain": plain}, digits(40), keeps, device="cpu", progress=False)
    images, labels = (torch.cat(parts) for parts in zip(*digits(40, batch_size=40)))
    for keep, hits in zip(keeps, curves["collapsed"].hits1, strict=True):
        model.keep = keep
        with torch.no_grad():
            assert hits == (model(images).argmax(1) == labels).sum()
    assert curves["plain"].keeps == [1.0] and curves["plain"].hits1[0] == curves["collapsed"].hits1[0]
    assert curves["collapsed"].images == 40 and type(plain) is not type(model)


def test_cells_are_chosen_at_each_keep_by_as_much_of_the_order_as_in_use():
    model, asked = with_orderer(tiny(), "collapse_ranker_tiny", "split"), []
    own = model.orderer.forward
    model.orderer.forward = lambda *args, upto=None, **kwargs: asked.append(upto) or own(*args, upto=upto, **kwargs)
    accuracy_curves({"collapsed": model}, digits(10), [1.0, 0.5, 0.25], device="cpu", progress=False)
    assert asked == [8, 4]


def test_a_copy_shares_weights_but_not_its_orderer():
    model = collapse(tiny(), "bayer", keep=0.5, remainder="fused")
    twin = with_orderer(model, "raster")
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert (model.orderer.baseline_name, model.keep, twin.orderer.baseline_name) == ("bayer", 0.5, "raster")
    assert twin.remainder == "fused" and with_orderer(model, "raster", "none").remainder == "none"
    images = torch.randn(2, 3, 32, 32)
    model.keep = 1.0
    assert not hasattr(plain_model(model), "keep") and torch.equal(plain_model(model)(images), model(images))


def test_random_orders_depend_on_the_seed_alone():
    found = [
        accuracy_curves({"x": with_orderer(tiny_seeded(), CollapseOrder.baseline("random", seed))}, digits(), [0.3],
                        device="cpu", progress=False)["x"].hits5
        for seed in (1, 1)
    ]  # fmt: skip
    assert found[0] == found[1]


def tiny_seeded():
    torch.manual_seed(3)
    return tiny()


def test_bf16_and_images_that_are_evenly_spaced():
    curve = accuracy_curves({"x": with_orderer(tiny(), "bayer")}, digits(7, 3), [0.5], "bf16", "cpu", progress=False)
    assert curve["x"].images == 7
    labels = torch.cat([labels for _, labels in image_batches(range_set(100), torch.tensor, 10, 4)])
    assert labels.tolist() == list(range(0, 100, 10))
    assert len(image_batches(range_set(5), torch.tensor, 10, 4).dataset) == 5


def range_set(count):
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return count

        def __getitem__(self, index):
            return 0.0, index

    return Numbers()


def test_costs_fall_with_keep_and_include_the_order():
    plain = tiny()
    models = {"bayer": with_orderer(plain, "bayer"), "ranker": with_orderer(plain, "collapse_ranker_tiny"), "p": plain}
    models["bayer"].keep = 0.7
    costs = costs_over_keep(models, torch.randn(2, 3, 32, 32), [1.0, 0.5, 0.25], runs=1)
    macs = {name: [cost.macs for cost in row] for name, row in costs.items()}
    assert macs["p"] == macs["bayer"][:1] == macs["ranker"][:1] and len(costs["p"]) == 1
    assert macs["bayer"][0] > macs["bayer"][1] > macs["bayer"][2] and macs["ranker"][1] > macs["bayer"][1]
    assert all(cost.images_per_second > 0 for row in costs.values() for cost in row) and models["bayer"].keep == 0.7


def test_the_plot_draws_what_was_measured():
    bent = AccuracyCurve([1.0, 0.5, 0.3, 0.2, 0.1], [80, 79, 78, 40, 1], [90] * 5, 100)
    curves = {"$a": bent, "plain": AccuracyCurve([1.0], [85], [95], 100)}
    speeds = {"$a": [10, 20, 30, 40, 50.0], "plain": [11.0]}
    first, second = plot_accuracy(curves, speeds).axes
    assert first.lines[0].get_xydata().tolist() == [[k, v] for k, v in zip(bent.keeps, bent.top1)]
    assert second.lines[0].get_xdata().tolist() == speeds["$a"]
    knee = [line.get_xydata().tolist() for ax in (first, second) for line in ax.lines if line.get_label() == "knee"]
    assert knee == [[[0.3, 78]], [[30, 78]]]
    texts = [text.get_text() for text in second.get_legend().get_texts()]
    assert texts == ["$a  (knee at 30%)", "plain"]
    assert len(plot_accuracy(curves, points="top5").axes) == 1


def test_the_plot_of_budgets_draws_what_was_measured():
    points = {"patch 16": [(16, 20.0, 1.0, 900.0)], "patch $4": [(16, 18.0, 1.0, 500.0), (64, 24.0, 1.5, 300.0)]}
    first, second = plot_budgets(points).axes
    for ax, column in ((first, 0), (second, 3)):
        for line, values in zip(ax.lines, points.values(), strict=True):
            assert line.get_xydata().tolist() == [[value[column], value[1]] for value in values]
    bars = [segment.tolist() for segment in first.collections[1].get_segments()]
    assert bars == [[[16, 17], [16, 19]], [[64, 22.5], [64, 25.5]]]
    assert [text.get_text() for text in second.get_legend().get_texts()] == list(points)


CURVE = AccuracyCurve([1.0, 0.5], [1, 1], [1, 1], 2)
REFUSED = [
    (lambda: accuracy_curves({"a": Known()}, known_batches(), [0.5, 4]), r"ratios in \(0, 1\], got 4"),
    (lambda: accuracy_curves({}, known_batches()), "at least one"),
    (lambda: accuracy_curves({"a": Known()}, [], progress=False), "at least one image"),
    (lambda: accuracy_curves({"a": Known()}, known_batches(), precision="8", progress=False), "must be no or bf16"),
    (lambda: accuracy_curves({"a": Known()}, [(torch.zeros(2, 3, 2, 2), torch.tensor([1, 20]))], device="cpu",
                             progress=False), r"labels must be in \[0, 20\), the classes of a, got 1 to 20"),
    (lambda: accuracy_curves({"a": Known()}, [(torch.zeros(2, 3, 2, 2), torch.tensor([1]))], progress=False),
     "labels must be one an image, got 1 for 2 images"),
    (lambda: accuracy_curves({"a": Known()}, [(torch.zeros(0, 3, 2, 2), torch.zeros(0).long())], progress=False),
     "at least one image"),
    (lambda: image_batches([], None, images=-1), "images must be at least 0 .*got -1 and 64"),
    (lambda: image_batches([], None, batch_size=0), "batch_size at least 1, got 0 and 0"),
    (lambda: AccuracyCurve([0.5, 1.0], [1, 1], [1, 1], 2), "keeps must be distinct and descend"),
    (lambda: AccuracyCurve([], [], [], 2), "at least one ratio"),
    (lambda: AccuracyCurve([1.0, 0.5], [1], [1, 1], 2), r"hits1 must be 2 counts in \[0, 2\], .*got \[1\]"),
    (lambda: AccuracyCurve([1.0, 0.5], [1, 1], [1, 3], 2), r"hits5 must be 2 counts in \[0, 2\], .*got \[1, 3\]"),
    (lambda: AccuracyCurve([1.0], [0], [0], 0), "images must be at least 1, got 0"),
    (lambda: with_orderer(torch.nn.Linear(2, 2), "bayer"), "cannot be collapsed"),
    (lambda: plot_accuracy({}), "at least one curve"),
    (lambda: plot_budgets({}), "at least one point"),
    (lambda: plot_budgets({"a": []}), "at least one point"),
    (lambda: plot_accuracy({"a": CURVE}, points="top3"), "top1 or top5"),
    (lambda: plot_accuracy({"a": CURVE}, {"a": [1.0]}), "one value for each"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED)
def test_refused(call, message):
    with pytest.raises(CollapseError, match=message):
        call()


def test_batches_of_no_images_count_as_nothing():
    batches = list(known_batches())
    empty = (batches[0][0][:0], batches[0][1][:0])
    found = accuracy_curves({"a": Known()}, [empty, *batches, empty], device="cpu", progress=False)
    assert found == accuracy_curves({"a": Known()}, batches, device="cpu", progress=False)
