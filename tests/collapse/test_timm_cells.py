"""Towers of vision-language models in timm: whole cells of patches are dropped, as if they were masked."""

import copy
import pickle

import pytest
import timm
import torch
from masked import Masked, NoOrder, randomize

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.collapse.base import Collapsed
from timm_collapse.collapse.cells import patches_of_cells

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
QWEN = {**TINY, "pos_embed_grid_size": 4}
GEMMA = {**TINY, "head_dim": 16, "intermediate_size": 48, "position_embedding_size": 32, "pooling_kernel_size": 2}
ALIGN = {**TINY, "downsample_ratio": 2, "out_features": 24}
FIVE = {"num_classes": 5}

FAMILIES = {
    "qwen": ("qwen3_vit_88m", QWEN | FIVE, 1),
    "qwen without pool": ("qwen3_vit_88m", QWEN | FIVE | {"global_pool": ""}, 1),
    "qwen merge": ("qwen3_vit_88m_merge", QWEN | FIVE | {"out_features": 24}, 2),
    "qwen merge by 3": ("qwen3_vit_88m_merge", QWEN | FIVE | {"out_features": 24, "merge_size": 3}, 3),
    "qwen encoder": ("qwen3_vit_88m_enc", QWEN | {"out_features": 24}, 2),
    "qwen encoder average": ("qwen3_vit_88m_enc", QWEN | {"global_pool": "avg"}, 1),
    "qwen encoder without pool": ("qwen3_vit_88m_enc", QWEN | {"global_pool": ""}, 1),
    "deepseek": ("deepseek_vit_412m", TINY | FIVE, 1),
    "deepseek align": ("deepseek_vit_412m_align", ALIGN | FIVE, 2),
    "deepseek encoder": ("deepseek_vit_412m_enc", ALIGN, 2),
    "deepseek encoder average": ("deepseek_vit_412m_enc", TINY | {"global_pool": "avg"}, 1),
    "gemma": ("gemma4_vit_167m", GEMMA | FIVE, 1),
    "gemma grouped queries": ("gemma4_vit_570m", GEMMA | FIVE | {"num_kv_heads": 1}, 1),
    "gemma soft": ("gemma4_vit_167m", GEMMA | FIVE | {"encoder_pool": "soft"}, 2),
    "gemma encoder": ("gemma4_vit_570m_enc", GEMMA, 2),
    "gemma encoder average": ("gemma4_vit_167m_enc", GEMMA | {"global_pool": "avg"}, 1),
    "gemma encoder without pool": ("gemma4_vit_167m_enc", GEMMA | {"global_pool": "none"}, 1),
}
GRID, N = (6, 12), 72

families = pytest.mark.parametrize("family", FAMILIES)
merging = pytest.mark.parametrize("family", ["qwen merge", "qwen encoder", "deepseek align", "gemma soft"])


def patch_of(family):
    return 14 if "deepseek" in family else 16


def pictures(family, grid=GRID, batch=2):
    return torch.randn(batch, 3, *(n * patch_of(family) for n in grid))


def make(family):
    """(model, images, an order of their cells, patches on a side of a cell): weights large enough to matter."""
    name, kwargs, side = FAMILIES[family]
    model = timm.create_model(name, img_size=tuple(n * patch_of(family) for n in GRID), **kwargs).eval()
    randomize(model)
    if family == "gemma encoder":
        model.std_bias.normal_(), model.std_scale.uniform_(0.5, 2)
    grid = (GRID[0] // side, GRID[1] // side)
    return model, pictures(family), Order(torch.rand(2, grid[0] * grid[1]), grid), side


def is_encoder(model):
    return not hasattr(model, "encoder")


def patches_one_by_one(order, side, keep):
    """(B, k side^2): the patches of the kept cells."""
    width = order.grid[1]
    places = [[(cell // width * side, cell % width * side) for cell in row] for row in order.keep(keep).tolist()]
    steps = [(i, j) for i in range(side) for j in range(side)]
    return torch.tensor([[(y + i) * width * side + x + j for y, x in row for i, j in steps] for row in places])


def rows(x, index):
    """(B, ..., D), (B, k) -> (B, k, D)."""
    x = x.flatten(1, -2)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1)


@families
@torch.no_grad()
def test_dropped_cells_are_as_if_masked_out_of_attention(family):
    model, images, order, side = make(family)
    cells, patches = order.keep(0.3), patches_one_by_one(order, side, 0.3)
    encoder = model if is_encoder(model) else model.encoder
    full = rows(encoder.forward_features(images), patches)
    with Masked(patches, N):
        kept = rows(encoder.forward_features(images), patches)
        merged = rows(encoder(images), cells) if side > 1 else None
    assert (full - kept).abs().max() > 1e-3  # the dropped patches matter
    collapse(model, NoOrder(), keep=0.3)
    features, output = model.forward_features(images, order=order), model(images, order=order)
    if is_encoder(model) or side == 1:  # features are of patches, in the plain model's layout
        assert features.ndim == (3 if "gemma" in family else 4)
        assert "gemma" in family or features.shape[1:3] == (cells.shape[1] * side, side)
        assert_same(features.flatten(1, -2), kept)
    else:
        assert_same(features, merged)
    if not is_encoder(model):
        assert_same(output, model.forward_head(features))
        pooled = (kept if merged is None else merged).mean(1)
        assert model.global_pool != "avg" or (output - model.head(model.norm(pooled))).abs().max() <= 1e-5
    elif side > 1:
        assert_same(output, merged)
    else:
        assert_same(output, kept.mean(1) if model.global_pool == "avg" else features)


@families
@torch.no_grad()
def test_keep_1_is_the_plain_model_bit_for_bit(family):
    model, images, order, _ = make(family)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    assert collapse(model, NoOrder(), keep=0.5) is model and isinstance(model, type(plain))
    assert list(model.state_dict()) == names and model.load_state_dict(plain.state_dict())
    model(images, order=order)
    for keep, given in ((1, {}), (order.num_patches, {"order": order})):
        model.keep = keep
        assert torch.equal(model(images, **given), plain(images))
        assert torch.equal(model.forward_features(images, **given), plain.forward_features(images))
        for options in ({}, {"output_fmt": "NLC", "indices": [0], "stop_early": True}):
            ours, theirs = (
                model.forward_intermediates(images, **options, **given),
                plain.forward_intermediates(images, **options),
            )
            assert torch.equal(ours[0], theirs[0]) and all(map(torch.equal, ours[1], theirs[1]))
    model.keep = 1
    model.train(), plain.train()
    assert torch.equal(model(images), plain(images))


@families
@torch.no_grad()
def test_intermediates_lie_on_the_grid_of_patches(family):
    model, images, order, side = make(family)
    patches = patches_one_by_one(order, side, 0.3)
    with Masked(patches, N):
        plain = model.forward_intermediates(images, indices=2, output_fmt="NLC")[1]
    collapse(model, NoOrder(), keep=0.3)
    features, found = model.forward_intermediates(images, indices=2, output_fmt="NLC", order=order)
    if family != "gemma soft":  # whose forward_features has pooled them
        assert_same(features, model.forward_features(images, order=order))
    dropped = torch.ones(2, N, 1).scatter(1, patches.unsqueeze(-1), 0.0).bool()
    for ours, theirs in zip(found, plain, strict=True):
        assert_same(ours, theirs.masked_fill(dropped, 0.0))
    maps = model.forward_intermediates(images, indices=2, intermediates_only=True, order=order)
    assert all(torch.equal(entry, tokens.mT.reshape(2, 32, *GRID)) for entry, tokens in zip(maps, found, strict=True))
    options = {"indices": [0], "stop_early": True, "intermediates_only": True}
    (first,) = model.forward_intermediates(images, **options, order=order)
    assert torch.equal(first, maps[0])


@pytest.mark.parametrize("grid, side", [((1, 1), 2), ((3, 5), 1), ((3, 2), 3), ((4, 7), 2)])
def test_patches_of_cells_one_by_one(grid, side):
    order = Order(torch.rand(3, grid[0] * grid[1]), grid)
    for keep in (1, order.num_patches):
        expected = patches_one_by_one(order, side, keep)
        assert torch.equal(patches_of_cells(order.keep(keep), grid, side), expected)
    assert expected.sort(1).values.tolist() == [list(range(grid[0] * grid[1] * side**2))] * 3


@families
@torch.no_grad()
def test_the_grid_and_the_order_are_of_cells_of_images_of_any_size(family):
    model, _, _, side = make(family)
    collapse(model, "variance", keep=0.3)
    for size in (GRID, (12, 6)):
        images, grid = pictures(family, size), (size[0] // side, size[1] // side)
        assert model.image_grid(images) == grid
        expected = CollapseOrder.baseline("variance")(images, grid)
        assert torch.equal(model.compute_order(images).indices, expected.indices)
        assert torch.equal(model(images), model(images, order=expected))
        with pytest.raises(CollapseError, match=r"order must be on the model's grid"):
            model(images, order=Order(torch.rand(2, 4 * N), (2 * size[0], 2 * size[1])))


@merging
@torch.no_grad()
def test_kept_cells_in_the_corner_are_the_picture_of_the_corner(family):
    model, images, order, side = make(family)
    if "qwen" in family:  # its absolute positions are stretched over the picture
        (model if is_encoder(model) else model.encoder).pos_embed.zero_()
    p = patch_of(family) * side
    expected = model(images[..., : 2 * p, : 3 * p])
    scores = torch.zeros(order.grid)
    scores[:2, :3] = 1
    collapse(model, NoOrder(), keep=6)
    assert_same(model(images, order=Order(scores.flatten().expand(2, -1), order.grid)), expected)


@families
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, images, order, _ = make(family)
    collapse(model.train(), "bayer", keep=0.3)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images, order=order).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("family", ["qwen merge", "gemma encoder"])
@torch.no_grad()
def test_compile_export_and_trace(family):
    model, images, _, _ = make(family)
    collapse(model, "bayer", keep=0.3)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (images,), dynamic_shapes=shapes).module()
    traced = torch.jit.trace(model, (images,), check_trace=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = pictures(family, batch=3)
    for other in (exported, traced, compiled):
        assert_same(other(images), model(images))
    torch._dynamo.reset()


@merging
@torch.no_grad()
def test_copies_are_independent_and_a_collapsed_model_can_be_collapsed_again(family):
    model, images, order, _ = make(family)
    collapse(model, "bayer", keep=0.3)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        other.keep = 0.6
        assert not torch.equal(other(images, order=order), expected) and torch.equal(model(images), expected)
    collapse(model, "raster", keep=0.3)
    raster = CollapseOrder.baseline("raster")(images, order.grid)
    assert torch.equal(model(images), model(images, order=raster))


@pytest.mark.parametrize("family", ["qwen merge", "deepseek encoder", "gemma soft"])
@torch.no_grad()
def test_a_saved_model_comes_back_collapsed(family, tmp_path):
    model, images, _, _ = make(family)
    collapse(model, "variance", keep=0.4)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(loaded, Collapsed) and type(loaded) is type(model)
    assert (loaded.keep, loaded.orderer.baseline_name) == (0.4, "variance")
    assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_half_precision_and_cells_as_the_model_is_now():
    for family in ("qwen encoder", "deepseek align", "gemma encoder"):
        model, images, order, _ = make(family)
        collapse(model, "bayer", keep=0.3).to(torch.bfloat16)
        output = model(images.bfloat16())
        assert output.dtype == torch.bfloat16 and output.isfinite().all()
    model, images, _, _ = make("qwen merge")
    collapse(model, "bayer", keep=0.3)
    model.prune_intermediate_layers([0])  # drops the projector too: nothing is merged any longer
    assert model.image_grid(images) == GRID and model.forward_features(images).shape == (2, 22, 1, 32)


@torch.no_grad()
def test_a_tower_that_pads_pictures_drops_padded_patches_as_others():
    model = timm.create_model("deepseek_vit_412m", **TINY, **FIVE, dynamic_img_pad=True).eval()
    randomize(model)
    images, order = torch.randn(2, 3, 50, 60), Order(torch.rand(2, 20), (4, 5))
    padded = torch.nn.functional.pad(images, (0, 10, 0, 6))
    with Masked(order.keep(0.5), 20):
        expected = rows(model.forward_features(images), order.keep(0.5))
    collapse(model, "variance", keep=0.5)
    assert_same(model.forward_features(images, order=order).flatten(1, 2), expected)
    assert torch.equal(model(images), model(padded))


def test_what_is_refused_names_what_was_given():
    plain = make("qwen merge")[0]
    for remainder in ("fused", "coarse", "mixed"):
        with pytest.raises(CollapseError, match=f"remainder must be none, got '{remainder}': .* whole cells"):
            collapse(plain, "bayer", remainder=remainder)
    assert not isinstance(plain, Collapsed)
    qwen, deepseek, gemma = (collapse(make(f)[0], "bayer", 0.5) for f in ("qwen merge", "deepseek align", "gemma soft"))
    images, coord = pictures("gemma"), torch.zeros(2, N, 2, dtype=torch.long)
    cells = r"whole cells of 2 x 2 patches .* got \(5, 4\) patches: resize to sides that are multiples of"
    cases = [
        (lambda: setattr(qwen, "remainder", "fused"), "remainder must be none"),
        (lambda: qwen(pictures("qwen", (5, 4))), cells + r" \(32, 32\)"),
        (lambda: deepseek(pictures("deepseek", (5, 4))), cells + r" \(28, 28\)"),
        (lambda: gemma(pictures("gemma", (5, 4))), cells),
        (lambda: qwen(torch.randn(2, 3, 60, 64)), r"multiples of \(16, 16\), got \(60, 64\)"),
        (lambda: qwen(torch.randn(3, 64, 64)), "images must be a tensor of shape"),
        (lambda: gemma(torch.randn(2, 1, 64, 64)), "images must have 3 channels"),
        (lambda: setattr(qwen, "keep", 0), "keep must be a ratio"),
        (lambda: qwen.forward_intermediates(pictures("qwen"), output_dict=True), "output_dict"),
        (lambda: gemma({"patches": images}), "images must be .* got a dict"),
        (lambda: gemma(images, coord), "patch_coord must be None"),
        (lambda: gemma.forward_features(images, patch_valid=coord[..., 0] == 0), "patch_valid must be None"),
        (lambda: gemma.forward_intermediates(images, coord), "patch_coord must be None"),
        (lambda: collapse(make("gemma encoder")[0], "bayer")(images, coord), "patch_coord must be None"),
    ]
    for call, message in cases:
        with pytest.raises(CollapseError, match=message):
            call()
    assert qwen.carrier.selection is None
    deepseek.keep = 1
    assert deepseek(pictures("deepseek", (5, 4))).shape == (2, 5)  # the plain model fills up the last cells


@torch.no_grad()
def test_patchified_batches_run_where_all_patches_are_kept():
    for family in ("gemma", "gemma encoder without pool"):
        model, images, _, _ = make(family)
        patches, grid = timm.models.naflexvit.batch_patchify(images, (16, 16))
        coord = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 1).expand(2, -1, -1)
        valid = torch.rand(2, N) < 0.7
        plain = model(patches, coord, valid)
        found = collapse(model, NoOrder(), keep=1)(patches, coord, valid)
        assert torch.equal(found, plain)
        options = {"indices": 1, "output_fmt": "NLC", "intermediates_only": True}
        (tokens,) = model.forward_intermediates(patches, coord, valid, **options)
        assert tokens.shape == (2, N, 32)
