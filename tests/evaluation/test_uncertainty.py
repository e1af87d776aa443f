import math

import pytest
import timm
import torch

import timm_collapse  # noqa: F401
from timm_collapse import CollapseError, CollapseOrder, Order
from timm_collapse.evaluation import greedy_oracle, uncertainty_curve
from timm_collapse.evaluation.report import markdown_table, relative_paths, without_paths, write_section
from timm_collapse.evaluation.uncertainty import visible_counts


class Knows(torch.nn.Module):
    """A judge with known errors: predicts 0, so that a hidden patch errs by its own mean absolute value."""

    def __init__(self):
        super().__init__()
        model = timm.create_model("collapse_reconstructor_tiny", img_size=8, patch_size=4, dim=32, depth=1)
        self.tokenizer = model.tokenizer

    def reconstruct(self, tokens, visible, grid):
        from timm_collapse import models

        return models.Reconstruction(torch.zeros_like(tokens), torch.zeros(tokens.shape[:2]))

    def errors(self, tokens, visible, grid):
        return tokens.abs().mean(-1).scatter(1, visible, 0.0)


@pytest.fixture
def images():
    """2 x 2 patches of values 1, 2, 3, 4."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    return values.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(2, 3, 8, 8).contiguous()


def test_curve_by_hand(images):
    order = Order.from_indices(torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3]]), (2, 2))
    curve = uncertainty_curve(Knows(), images, order)
    assert curve.per_image[:, 0].tolist() == [2.5, 2.0, 1.5, 1.0] and curve.per_image[:, 1].tolist() == [
        2.5,
        3.0,
        3.5,
        4.0,
    ]
    assert curve.error.tolist() == [2.5, 2.5, 2.5, 2.5] and curve.area == pytest.approx(2.5)
    assert curve.areas.tolist() == pytest.approx([1.75, 3.25])
    assert curve.sum_area == pytest.approx((2.5 / 2 + 2.5 * 0.75 + 2.5 * 0.5 + 2.5 * 0.25 / 2) / 3)
    assert curve.entropy[0] == pytest.approx(1 + math.log(2)) and curve.at(2) == 2.5
    assert curve.cross_entropy.tolist() == pytest.approx([2.5 + math.log(2)] * 4)  # the scale is 1, the error 2.5
    assert curve.cross_entropy_area == pytest.approx((2.5 + math.log(2)) / 2.5 * curve.sum_area)


def test_oracle_takes_the_worst_patch_first(images):
    assert greedy_oracle(Knows(), images).indices.tolist() == [[3, 2, 1, 0]] * 2
    assert greedy_oracle(Knows(), images, upto=1).indices[0].tolist() == [3, 0, 1, 2]


def test_oracle_is_not_beaten_at_its_first_step():
    torch.manual_seed(0)
    judge = timm.create_model(
        "collapse_reconstructor_tiny", img_size=16, patch_size=4, dim=32, depth=1, decoder_dim=32, decoder_depth=1
    ).eval()
    images = torch.randn(1, 3, 16, 16)
    first = uncertainty_curve(judge, images, greedy_oracle(judge, images, upto=1), [0, 1]).error[1]
    for j in range(16):
        rest = [n for n in range(16) if n != j]
        other = Order.from_indices(torch.tensor([[j, *rest]]), (4, 4))
        assert first <= uncertainty_curve(judge, images, other, [0, 1]).error[1] + 1e-6


def test_measured_counts_always_hold_the_reported_ones():
    assert visible_counts(64) == list(range(64))
    assert {0, 6, 14, 32, 63} <= set(visible_counts(64, 10)) and {18, 43, 98} <= set(visible_counts(196, 12))


def test_wrong_order_is_refused(images):
    with pytest.raises(CollapseError, match="2 orders on grid \\(2, 2\\), got 1 on grid \\(4, 4\\)"):
        uncertainty_curve(Knows(), images, CollapseOrder.baseline("raster")(images[:1], (4, 4)))
    order = CollapseOrder.baseline("raster")(images, (2, 2))
    with pytest.raises(CollapseError, match="7 was not measured"):
        uncertainty_curve(Knows(), images, order).at(7)


def test_commands_name_no_machine_paths():
    paths = ["/a/b/runs/x", "best=/a/b/runs/x", "../../data/set", "--name=y", "plain", "local-dir:/a/b/runs/x"]
    assert [relative_paths(p) for p in paths] == [
        "runs/x", "best=runs/x", "data/set", "--name=y", "plain", "local-dir:runs/x"
    ]  # fmt: skip


def test_no_path_of_a_machine_stays_in_a_recipe():
    recipe = {
        "dataset": "digits+/home/me/secret/data/x",
        "table": "wds//home/me/secret/data/x",
        "model_args": '{"orderer": "/home/me/secret/runs/ranker"}',
        "nested": [{"init": "local-dir:/home/me/secret/runs/base"}, 3, None],
        "url": "https://example.org/a/b/c",
    }
    assert without_paths(recipe) == {
        "dataset": "digits+data/x",
        "table": "wds/data/x",
        "model_args": '{"orderer": "runs/ranker"}',
        "nested": [{"init": "local-dir:runs/base"}, 3, None],
        "url": "https://example.org/a/b/c",
    }


def test_sections_are_replaced_not_repeated(tmp_path):
    page = tmp_path / "results.md"
    write_section("a", "A", markdown_table([{"x": 1, "y": "b"}]), {"x": 1}, page)
    write_section("b", "B", "text", {}, page)
    write_section("a", "A", "again", {"x": 2}, page)
    text = page.read_text()
    assert (
        text.count("## A") == 1
        and "again" in text
        and "| x | y |" not in text
        and text.index("## A") < text.index("## B")
    )
    assert '"x": 2' in (tmp_path / "a.json").read_text()
