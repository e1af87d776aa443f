"""Plots: what is drawn equals what was given, and what is refused."""

import json

import numpy as np
import pytest
import torch
from matplotlib.collections import EllipseCollection, LineCollection

from timm_collapse.order import CollapseError, Order
from timm_collapse.plots import (
    plot_class_heatmap,
    plot_dependency,
    plot_kept,
    plot_order,
    plot_training,
    plot_uncertainty,
    save,
)
from timm_collapse.plots.style import BLANK


def random_order(images=1, grid=(4, 6)):
    return Order(torch.rand(images, grid[0] * grid[1]), grid)


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


def assert_kept(array, image, kept, grid):
    """The kept patches are the image's, and exactly the others are blank."""
    height, width = image.shape[1] // grid[0], image.shape[2] // grid[1]
    for n in range(grid[0] * grid[1]):
        top, left = n // grid[1] * height, n % grid[1] * width
        patch = array[top : top + height, left : left + width]
        original = image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(patch, original if n in kept else np.full_like(original, BLANK), atol=1e-6)


@pytest.mark.parametrize("keep", [1, 0.22, 1.0])
def test_plot_order_draws_circles_kept_patches_and_ranks(keep):
    image, order = torch.rand(3, 8, 18), random_order()
    figure = plot_order(image, order, keep, path_patches=5)
    circles, kept, heat, _bar = figure.axes
    assert_kept(drawn(kept), image, order.keep(keep)[0].tolist(), (4, 6))
    assert drawn(heat).tolist() == order.ranks.view(4, 6).tolist()

    ellipses = next(c for c in circles.collections if isinstance(c, EllipseCollection))
    offsets, sizes = np.asarray(ellipses.get_offsets()), ellipses.get_widths()
    patches = (offsets[:, 1] // 1 * 6 + offsets[:, 0] // 1).astype(int)
    assert sorted(patches) == list(range(24))
    assert patches[sizes.argsort()[::-1]].tolist() == order.indices[0].tolist()  # larger = earlier

    legs = next(c for c in circles.collections if isinstance(c, LineCollection)).get_segments()
    path = [(n % 6 + 0.5, n // 6 + 0.5) for n in order.indices[0, :5].tolist()]
    assert [tuple(leg[0]) for leg in legs] + [tuple(legs[-1][1])] == path


def test_plot_order_where_the_grid_does_not_divide_the_image():
    image, order = torch.rand(3, 7, 9), random_order(grid=(2, 2))
    array = drawn(plot_order(image, order, keep=0.25).axes[1])
    row, column = divmod(int(order.indices[0, 0]), 2)
    rows, columns = [range(0, 3), range(3, 7)][row], [range(0, 4), range(4, 9)][column]
    blank = (array == np.float32(BLANK)).all(axis=2) | (array == BLANK).all(axis=2)
    assert {(int(y), int(x)) for y, x in np.argwhere(~blank)} == {(y, x) for y in rows for x in columns}


@pytest.mark.parametrize("grid", [(1, 1), (1, 3)])
@pytest.mark.parametrize("path_patches", [0, 1, 64])
def test_plot_order_of_very_few_patches(tmp_path, grid, path_patches):
    save(plot_order(torch.rand(3, 6, 6), random_order(grid=grid), 1, path_patches), tmp_path / "a.png")


@pytest.mark.parametrize("images", [1, 8, 11])
def test_plot_kept_pairs_every_image_with_its_patches(images):
    batch, order = torch.rand(images, 3, 8, 12), random_order(images)
    axes = plot_kept(batch, order, 0.3).axes
    columns = {1: 1, 8: 8, 11: 6}[images]
    assert len(axes) % (2 * columns) == 0 and sum(len(ax.images) for ax in axes) == 2 * images
    for i in range(images):
        above = i // columns * 2 * columns + i % columns
        np.testing.assert_allclose(drawn(axes[above]), batch[i].permute(1, 2, 0).numpy(), atol=1e-6)
        assert_kept(drawn(axes[above + columns]), batch[i], order.keep(0.3)[i].tolist(), (4, 6))


def test_plot_dependency_draws_weights_as_alpha_and_outlines_the_target():
    weights = torch.rand(24)
    ax = plot_dependency(torch.rand(3, 8, 12), weights, 15, (4, 6)).axes[0]
    alpha = np.asarray(ax.images[1].get_array())[..., 3].flatten()
    np.testing.assert_allclose(alpha / alpha.max(), (weights / weights.max()).numpy(), atol=1e-6)
    assert {patch.get_xy() for patch in ax.patches} == {(3, 2)}


def test_plot_dependency_on_nothing(tmp_path):
    save(plot_dependency(torch.rand(3, 8, 8), torch.zeros(4), 0, (2, 2)), tmp_path / "a.png")


def test_plot_class_heatmap_sorts_patches_by_the_mean_rank_of_the_class():
    orders = {f"$class {c}": random_order(images=c + 2) for c in range(5)}
    axes = plot_class_heatmap(orders).axes
    assert len(axes) == 5 + 1  # and one colour bar
    for ax, (name, order) in zip(axes, orders.items()):
        assert ax.get_title() == name
        assert (np.diff(drawn(ax).mean(axis=0)) >= 0).all()
        assert np.sort(drawn(ax), axis=1).tolist() == [list(range(24))] * len(order)


def test_plot_training_from_dicts_and_from_a_file(tmp_path):
    log = [{"step": 20 * i, "lr": 1e-3, "loss": 1 / i, **({"gain": float(i)} if i % 2 else {})} for i in range(1, 6)]
    figure = plot_training(log)
    assert [ax.get_title() for ax in figure.axes] == ["lr", "loss", "gain"]
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[20, 1], [60, 3], [100, 5]]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step": 120, "lo')  # still being written
    (ax,) = plot_training(path, ["loss"]).axes
    assert ax.lines[0].get_xydata().tolist() == [[20 * i, 1 / i] for i in range(1, 6)]


def test_plot_uncertainty_sorts_the_legend_by_area_and_greys_random(tmp_path):
    curves = {"centre": [4, 4, 1], "random": np.array([4.0, 3, 1]), "a $b": torch.tensor([4.0, 1, 1])}
    figure = plot_uncertainty(curves)
    (ax,) = figure.axes
    assert [line.get_ydata().tolist() for line in ax.lines] == [list(map(float, c)) for c in curves.values()]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["a $b  1.750  (-36.4%)", "random  2.750", "centre  3.250  (+18.2%)"]
    assert (ax.lines[1].get_color(), ax.lines[1].get_linestyle()) == ("0.5", "--")
    assert len({line.get_color() for line in ax.lines}) == 3
    save(figure, tmp_path / "a.svg")
    (ax,) = plot_uncertainty({"x": [4, 2]}, visible=[0, 8]).axes
    assert ax.lines[0].get_xdata().tolist() == [0, 8]


def test_plot_uncertainty_tells_many_orders_apart():
    lines = plot_uncertainty({str(i): [i, i] for i in range(20)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle(), line._dash_pattern[1] is None) for line in lines}) == 20


@pytest.mark.parametrize("name, start", [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml")])
def test_save_writes_what_the_suffix_says(tmp_path, name, start):
    path = save(plot_training([{"step": 1, "loss": 2.0}]), tmp_path / name)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name, message", [("a.jpg", "png"), ("a", "png"), ("none/a.png", "folder .* does not exist")])
def test_save_refuses(tmp_path, name, message):
    with pytest.raises(CollapseError, match=message):
        save(plot_training([{"step": 1, "loss": 2.0}]), tmp_path / name)


IMAGE = torch.rand(3, 8, 12)
REFUSED = [
    (lambda: plot_order(IMAGE * 2, random_order()), r"image must be in \[0, 1\]"),
    (lambda: plot_order(IMAGE / 0 * 0, random_order()), r"image must be in \[0, 1\]"),
    (lambda: plot_order(IMAGE[:1], random_order()), "image must be a float tensor"),
    (lambda: plot_order((IMAGE * 255).byte(), random_order()), "image must be a float tensor"),
    (lambda: plot_order(IMAGE, random_order(2)), "order must be of one image"),
    (lambda: plot_order(IMAGE, random_order(), keep=0.0), "keep must be"),
    (lambda: plot_kept(IMAGE, random_order()), "images must be"),
    (lambda: plot_kept(IMAGE[None], random_order(2)), "images must be"),
    (lambda: plot_kept(IMAGE.expand(257, -1, -1, -1), random_order(257)), "images must be 1 to 256"),
    (lambda: plot_dependency(IMAGE, torch.rand(23), 0, (4, 6)), "weights must be 24"),
    (lambda: plot_dependency(IMAGE, torch.full((24,), -1.0), 0, (4, 6)), "weights must be 24"),
    (lambda: plot_dependency(IMAGE, torch.rand(24), 24, (4, 6)), "target must be"),
    (lambda: plot_class_heatmap({}), "at least one class"),
    (lambda: plot_class_heatmap({"a": random_order(), "b": random_order(grid=(2, 2))}), "share one grid"),
    (lambda: plot_training([]), "at least one line"),
    (lambda: plot_training([{"loss": 1.0}]), "step"),
    (lambda: plot_training([{"step": 1}]), "nothing but steps"),
    (lambda: plot_training([{"step": 1, "loss": 1.0}], ["l1"]), "l1 not in the log; it has loss"),
    (lambda: plot_training(__file__), "log.jsonl"),
    (lambda: plot_uncertainty({}), "curves must be"),
    (lambda: plot_uncertainty({"a": [1.0]}), "curves must be"),
    (lambda: plot_uncertainty({"a": [1.0, 2], "b": [1.0, 2, 3]}), "curves must be"),
    (lambda: plot_uncertainty({"a": [1.0, 2]}, visible=[0, 1, 2]), "curves must be"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refused(call, message):
    with pytest.raises(CollapseError, match=message):
        call()
