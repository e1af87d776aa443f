"""The training-free orders of the benchmarks, against loops over patches, and the table that they are measured in."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch

from timm_collapse import CollapseError


def load(name):
    file = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


orders, cells = load("vit_orders"), load("vit_cells")


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(3)), dim=-1)


def vit(**kwargs):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **kwargs}).eval()


def test_k_centre_is_farthest_first():
    points = unit(2, 12, 5)
    found = orders.k_centre(points, 12)
    for chosen, row in zip(found.tolist(), points):
        assert chosen[0] == int((row @ row.mean(0)).argmin()) and sorted(chosen) == list(range(12))
        for i in range(1, 12):
            nearest = [max(float(row[j] @ row[c]) for c in chosen[:i]) for j in range(12)]
            left = {j: nearest[j] for j in range(12) if j not in chosen[:i]}
            assert nearest[chosen[i]] == pytest.approx(min(left.values()), abs=1e-6)


def test_greedy_dpp_maximises_the_determinant_step_by_step():
    points = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(4)).double()
    kernel = points @ points.mT
    found = orders.greedy_dpp(kernel, 9)
    for chosen, k in zip(found.tolist(), kernel):
        assert sorted(chosen) == list(range(9))
        for i in range(9):
            gains = {j: torch.linalg.det(k[[*chosen[:i], j]][:, [*chosen[:i], j]]).item() for j in range(9)}
            left = [gains[j] for j in range(9) if j not in chosen[:i]]
            assert gains[chosen[i]] == pytest.approx(max(left), rel=1e-6)


def test_greedy_dpp_of_fewer_directions_than_items_repeats_none():
    points = unit(1, 10, 3).double()
    assert sorted(orders.greedy_dpp(points @ points.mT, 10)[0].tolist()) == list(range(10))


@torch.no_grad()
def test_class_attention_is_that_of_the_last_block():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    found, attention = orders.class_attention(model, images), model.blocks[-1].attn
    attention.fused_attn = False
    seen = []
    handle = attention.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    handle.remove()
    assert torch.allclose(found, seen[0][:, :, 0, 1:].mean(1), atol=1e-6)
    with pytest.raises(CollapseError, match="class-attention needs a ViT with a class token"):
        orders.class_attention(vit(class_token=False, global_pool="avg"), images)


@pytest.mark.parametrize("name", orders.OWN_ORDERS)
def test_orders_begin_with_what_was_chosen(name):
    model, images = vit(), torch.randn(3, 3, 32, 32)
    few, many = (orders.OWN_ORDERS[name](model, images, count) for count in (4, 9))
    assert few.grid == (4, 4) and torch.equal(few.first(4), many.first(4)) and len(few) == 3


def test_cells_have_names_and_rows():
    cell = cells.Cell("random 1", "mixed", 0.5, 0.7, 64)
    assert cells.Cell.of(cell.key) == cell and cells.Cell.is_key(cell.key) and not cells.Cell.is_key("downscaled|64")
    assert cell.work == cells.Cell("random", "mixed", 0.5, 1.0, 64).key and cell.method == "mixed 0.5, area bias 0.7"
    found = {
        cell._replace(order=f"random {i}", budget=b).key: {"top1": b + i, "root_kl": 0.5}
        for i in (0, 1)
        for b in (8, 4)
    }
    better = {cell._replace(order="bayer", budget=8).key: {"top1": 90.0, "root_kl": 0.25, "images_per_second": 3.0}}
    rows = cells.rows_of(cells.Cell.all_of(found | better), found | better)
    assert rows == [
        {"order": "bayer", "rest": cell.method, "8 tokens": "90.0 (0.25), 3.0/s", "4 tokens": ""},
        {"order": "random", "rest": cell.method, "8 tokens": "8.5 (0.50)", "4 tokens": "4.5 (0.50)"},
    ]
    points = {key: {**value, "tokens": 8, "error": 1.0, "images_per_second": 2.0} for key, value in found.items()}
    points["downscaled|9"] = {"top1": 7.0, "root_kl": 0.1, "tokens": 9, "error": 1.0, "images_per_second": 4.0}
    points[cell._replace(order="random 1:reversed").key] = points[cell._replace(budget=8).key]
    orders, remainders = ["random 1", "random 1:reversed"], ["mixed:0.5"]
    assert cells.curves(points, 0.7, orders, remainders).keys() == {"random 1, mixed 0.5, area bias 0.7", "downscaled"}
    assert cells.curves(points, 0.7, orders, []).keys() == cells.curves(points, 0.7, [], remainders).keys()
    assert cells.curves(points, 0.5, orders, remainders) == {"downscaled": [(9, 7.0, 1.0, 4.0)]}
