"""Every family of timm models that `collapse` takes, against a full forward pass without the dropped patches."""

import collections
import copy
import sys
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from masked import Masked, NoOrder, randomize
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse.convert import ADAPTERS
from timm_collapse.collapse.timm_cells import CollapsedCells

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2}
GRID = (6, 5)

FAMILIES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average pool": ("vit_small_patch16_224", {"global_pool": "avg"}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "pre norm": ("vit_base_patch16_clip_224", {}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "scaled parallel blocks": ("vit_base_patch16_xp_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "eva rope": ("eva02_tiny_patch14_224", {}),
    "eva swiglu": ("eva02_base_patch16_clip_224", {}),
    "eva rope without absolute": ("vit_small_patch16_rope_224", {}),
    "eva rope and absolute": ("vit_small_patch16_rope_ape_224", {}),
    "eva mixed rope": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "eva dynamic size": ("vit_small_patch16_dinov3", {"dynamic_img_size": True}),
    "naflex": ("naflexvit_base_patch16_gap", {}),
    "naflex factorized": ("naflexvit_base_patch16_parfac_gap", {}),
    "naflex attention pool": ("naflexvit_base_patch16_map", {}),
    "naflex of a vit": ("vit_base_patch16_clip_224", {"use_naflex": True}),
    "naflex rope": ("eva02_tiny_patch14_224", {"use_naflex": True}),
    "naflex mixed rope": ("vit_small_patch16_rope_mixed_224", {"use_naflex": True}),
    "cait": ("cait_xxs24_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit both biases": ("beitv2_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    "beit without bias": ("beitv2_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
}

families = pytest.mark.parametrize("family", FAMILIES)


def make(family, **kwargs):
    """(model, images, order): random weights large enough that every part matters."""
    name, extra = FAMILIES[family]
    kwargs = {**TINY, "num_classes": 5, **extra, **kwargs}
    patch = 14 if "patch14" in name else 16
    size = (GRID[0] * patch, GRID[1] * patch)
    if not name.startswith("naflexvit"):
        kwargs["img_size"] = size
    model = timm.create_model(name, **kwargs).eval()
    randomize(model)
    return model, torch.randn(2, 3, *size), Order(torch.rand(2, GRID[0] * GRID[1]), GRID)


@torch.no_grad()
def masked_features(model, images, kept, num_patches):
    """What dropping must give, (B, prefix + k, D), of the plain model."""
    with Masked(kept, num_patches):
        x = model.forward_features(images)
    prefix = model.num_prefix_tokens
    assert x.shape[1] == prefix + num_patches
    patches = x[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :prefix], patches], 1)


@families
def test_dropped_patches_are_as_if_masked_out_of_attention(family):
    model, images, order = make(family)
    kept = order.keep(0.22)
    reference = masked_features(model, images, kept, 30)
    full = model.forward_features(images)
    collapse(model, NoOrder(), keep=0.22, remainder="none")
    with torch.no_grad():
        features, logits = model.forward_features(images, order=order), model(images, order=order)
    assert features.shape[1] == model.num_prefix_tokens + 7
    assert (features - reference).abs().max() <= 1e-5
    assert (features[:, -7:] - full[:, -30:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 64))).abs().max() > 1e-3
    assert (logits - model.forward_head(reference)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["class token", "eva mixed rope"])
def test_the_reference_is_what_timms_own_mask_gives(family):
    model, images, order = make(family)
    kept = order.keep(0.22)
    mask = F.pad(~order.mask(0.22), (model.num_prefix_tokens, 0))
    bias = torch.zeros(mask.shape).masked_fill(mask, float("-inf"))[:, None, None].expand(-1, -1, mask.shape[1], -1)
    full = model.forward_features(images, attn_mask=bias)
    prefix = model.num_prefix_tokens
    own = torch.cat([full[:, :prefix], full[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 64))], 1)
    assert (own - masked_features(model, images, kept, 30)).abs().max() <= 1e-5


@families
def test_keep_1_is_the_plain_model_bit_for_bit(family):
    model, images, _ = make(family)
    plain = copy.deepcopy(model)
    names = list(model.state_dict())
    assert collapse(model, NoOrder(), keep=1, remainder="none") is model and isinstance(model, type(plain))
    assert list(model.state_dict()) == names
    assert torch.equal(model(images), plain(images))
    assert torch.equal(model.forward_features(images), plain.forward_features(images))
    for ours, theirs in zip(model.forward_intermediates(images)[1], plain.forward_intermediates(images)[1]):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        model.train(), plain.train()
        assert torch.equal(model(images), plain(images))


@families
def test_intermediates_lie_on_the_grid(family):
    model, images, order = make(family)
    collapse(model, "bayer", keep=0.22, remainder="none")
    index = order.keep(0.22).unsqueeze(-1).expand(-1, -1, 64)
    features, (first, last) = model.forward_intermediates(images, indices=2, output_fmt="NLC", order=order)
    assert (features - model.forward_features(images, order=order)).abs().max() <= 1e-5
    assert first.shape == last.shape == (2, 30, 64)
    expected = torch.zeros(2, 30, 64).scatter(1, index, last.gather(1, index))
    assert torch.equal(last, expected) and (last.gather(1, index) != 0).any()
    maps = model.forward_intermediates(images, indices=2, intermediates_only=True, order=order)
    assert torch.equal(maps[1], last.mT.reshape(2, 64, *GRID))


@families
@pytest.mark.parametrize("remainder", ["fused", "coarse"])
def test_remainder_stays_within_the_budget_and_fills_the_dropped_places(family, remainder):
    model, images, order = make(family)
    collapse(model, "bayer", keep=9, remainder=remainder)
    cells = {"fused": 1, "coarse": 4}[remainder]
    features = model.forward_features(images, order=order)
    assert features.shape[1] == model.num_prefix_tokens + 9
    (last,) = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True, order=order)
    dropped = ~order.mask(9 - cells)
    assert all(len(last[i][dropped[i]].unique(dim=0)) == cells for i in range(2))
    model(images, order=order).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "patch_embed" in n or "embeds.proj" in n)


@families
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, images, order = make(family)
    collapse(model.train(), "bayer", keep=0.3, remainder="fused")
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images, order=order).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_naflex_takes_patchified_batches_only_where_all_are_kept():
    model, images, order = make("naflex")
    patches, grid = timm.models.naflexvit.batch_patchify(images, (16, 16))
    coord = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 1).expand(2, -1, -1)
    batch = {"patches": patches, "patch_coord": coord, "patch_valid": torch.ones(2, 30, dtype=torch.bool)}
    plain = model(batch)
    collapse(model, NoOrder(), keep=1, remainder="none")
    assert torch.equal(model(batch), plain)
    assert torch.equal(model(**{"x": patches, "patch_coord": coord, "patch_valid": batch["patch_valid"]}), plain)
    collapse(model, "bayer", keep=0.5, remainder="none")
    for call in (
        lambda: model(batch),
        lambda: model(patches, coord, batch["patch_valid"]),
        lambda: model(batch, order=order),
        lambda: model.forward_intermediates(batch, output_fmt="NLC"),
        lambda: model.forward_features(images, patch_coord=coord),
        lambda: model(images, attn_mask=torch.zeros(2, 1, 34, 34)),
    ):
        with pytest.raises(CollapseError, match="images|patch_coord|attn_mask"):
            call()
    assert model(torch.randn(1, 3, 64, 96), order=Order(torch.rand(1, 24), (4, 6))).shape == (1, 5)
    with pytest.raises(CollapseError, match=r"multiples of \(16, 16\)"):
        model(torch.randn(1, 3, 60, 96))


@pytest.mark.parametrize("family", ["beit", "beit shared bias", "class token", "eva rope", "eva rope and absolute"])
def test_a_new_input_size_works(family):
    model, images, _ = make(family)
    collapse(model, "bayer", keep=0.25, remainder="none")
    patch = images.shape[-1] // GRID[1]
    model.set_input_size(img_size=(4 * patch, 8 * patch))
    images, order = torch.randn(2, 3, 4 * patch, 8 * patch), Order(torch.rand(2, 32), (4, 8))
    collapsed = model.forward_features(images, order=order)
    model.keep = 1
    assert (collapsed - masked_features(model, images, order.keep(0.25), 32)).abs().max() <= 1e-5


# -- census
# -------------------------------------------------------------------------------------------------------


class Found(Exception):
    """The class of a model that was about to be built."""


def class_of(name):
    """A model's class, without building it: what its module hands to timm's builder."""
    module = sys.modules[timm.models.model_entrypoint(name).__module__]

    def stop(cls, *args, **kwargs):
        raise Found(cls)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(module, "build_model_with_cfg", stop)
        try:
            timm.create_model(name)
        except Found as found:
            return found.args[0]
    raise AssertionError(f"{name} was built in another way")


def timm_models():
    """Architectures of timm itself, by class."""
    classes = collections.defaultdict(list)
    for name in timm.list_models():
        if timm.models.model_entrypoint(name).__module__.startswith("timm."):
            classes[class_of(name)].append(name)
    return classes


def build(name, **kwargs):
    """An architecture with two blocks; some have lists of one entry per block."""
    try:
        return timm.create_model(name, depth=2, **kwargs)
    except AssertionError as error:
        if "num_kv_heads" not in str(error):
            raise
        return timm.create_model(name, depth=2, num_kv_heads=(None, None), **kwargs)


@pytest.mark.slow
def test_census():
    """Every architecture of timm is collapsed, or refused with the reason."""
    collapsed, refused = collections.defaultdict(list), collections.defaultdict(list)
    for cls, names in timm_models().items():
        if cls not in ADAPTERS:
            model = cls.__new__(cls)  # its class alone decides
            nn.Module.__init__(model)
            with pytest.raises(CollapseError, match=f"{cls.__name__} cannot be collapsed: it") as error:
                collapse(model, "bayer")
            assert "no known place" not in str(error.value)
            refused[cls.__name__] += names
            continue
        for name in names:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "VisionTransformer has a convolutional stem")
                collapse(build(name), "bayer")
            collapsed[cls.__name__].append(name)
    known = {
        "VisionTransformer": 202,
        "Eva": 65,
        "NaFlexVit": 14,
        "Cait": 10,
        "Beit": 7,
        "VisionTransformerDistilled": 4,
        "Qwen3VitClassifier": 6,
        "Qwen3VitEncoder": 3,
        "Gemma4VitClassifier": 2,
        "Gemma4VitEncoder": 2,
        "DeepseekVitClassifier": 2,
        "DeepseekVitEncoder": 1,
    }
    assert collapsed.keys() == known.keys()
    assert all(len(collapsed[name]) >= count for name, count in known.items())
    for name, cls in (
        ("vit_base_patch16_dinov3", "Eva"),
        ("vit_base_patch14_reg4_dinov2", "VisionTransformer"),
        ("vitamin_base_224", "VisionTransformer"),
        ("beit3_base_patch16_224", "VisionTransformer"),
        ("beitv2_base_patch16_224", "Beit"),
        ("qwen3_vit_88m", "Qwen3VitClassifier"),
        ("gemma4_vit_570m_enc", "Gemma4VitEncoder"),
        ("deepseek_vit_412m_align", "DeepseekVitClassifier"),
    ):
        assert name in collapsed[cls]
    for name, cls in (("resnet50", "ResNet"), ("volo_d1_224", "VOLO"), ("xcit_nano_12_p16_224", "Xcit")):
        assert name in refused[cls]


def signature(model):
    """What of an architecture can matter for dropping tokens."""
    flags = ("no_embed_class", "num_prefix_tokens", "global_pool", "rope_mixed", "pool_include_prefix")
    kinds = frozenset(type(module).__name__ for module in model.modules())
    return (type(model), kinds, getattr(model, "pos_embed", 0) is None, *(getattr(model, f, None) for f in flags))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*convolutional stem")
def test_none_is_silently_wrong():
    """One architecture of every kind that timm builds: dropped patches are as if masked out of attention."""
    kinds = {}
    cells = [cls for cls, adapter in ADAPTERS.items() if issubclass(adapter, CollapsedCells)]  # test_timm_cells.py
    for cls in [cls for cls in ADAPTERS if cls not in cells]:
        for name in timm_models()[cls]:
            with torch.device("meta"):
                kinds.setdefault(signature(build(name)), name)
    assert len(kinds) >= 60
    for name in kinds.values():
        model, images, order = small(name)
        kept, prefix = order.keep(0.3), model.num_prefix_tokens
        reference = masked_features(model, images, kept, order.num_patches)
        with torch.no_grad():
            full = model.forward_features(images)
            collapse(model, NoOrder(), keep=0.3, remainder="none")
            features = model.forward_features(images, order=order)
        worst = (features - reference).abs().max() / reference.abs().max().clamp_min(1)
        assert features.shape == reference.shape and worst <= 1e-5, (name, float(worst))
        full = full[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, full.shape[-1]))
        assert (features[:, prefix:] - full).abs().max() > 1e-3, name  # the dropped patches would have mattered


def small(name):
    """(model, images, order) of an architecture of two narrow blocks on nine patches or more."""
    with torch.device("meta"):
        plain = build(name)
    embed = getattr(plain, "patch_embed", None) or plain.embeds
    stem = hasattr(embed, "backbone")
    side = 3 * embed.feat_ratio()
    kwargs = {"num_classes": 3} | ({} if name.startswith("naflexvit") else {"img_size": side})
    model = build(name, **kwargs, **({} if stem else {"embed_dim": 96, "num_heads": 2})).eval()
    randomize(model)
    return model, torch.randn(2, 3, side, side), Order(torch.rand(2, 9), (3, 3))
