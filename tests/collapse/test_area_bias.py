"""Tokens that count for the area they stand for: as copies would, as an explicit mask says, and where it is refused."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models import save_for_hf
from torch import nn
from torch.overrides import TorchFunctionMode

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.evaluation.accuracy import with_orderer

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ORDER = Order(torch.rand(2, 64, generator=torch.Generator().manual_seed(2)), (8, 8))
AREAS = {  # of a budget of 20 tokens of 8 x 8 patches: (tokens, patches each) of the remainder
    "fused": [(1, 45)],
    "coarse": [(9, 64 / 9)],
    "mixed": [(10, 4), (1, 16)],
    "split": [(12, 64 / 36), (6, 64 / 9)],
}

FAMILIES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average pool": ("vit_small_patch16_224", {"global_pool": "avg"}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "global_pool": "avg"}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "scaled parallel blocks": ("vit_base_patch16_xp_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "eva rope": ("eva02_tiny_patch14_224", {}),
    "eva mixed rope": ("vit_small_patch16_rope_mixed_224", {}),
    "eva attention pool": ("vit_pe_core_tiny_patch16_384", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "naflex": ("naflexvit_base_patch16_gap", {}),
    "naflex attention pool": ("naflexvit_base_patch16_map", {}),
    "naflex rope": ("eva02_tiny_patch14_224", {"use_naflex": True}),
    "beit": ("beit_base_patch16_224", {}),
    "beit shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit without bias": ("beitv2_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
}
families = pytest.mark.parametrize("family", FAMILIES)
remainders = pytest.mark.parametrize("remainder", AREAS)


def make(family, **kwargs):
    name, more = FAMILIES[family]
    shape = {key: value for key, value in TINY.items() if not (name.startswith("naflexvit") and key == "img_size")}
    model = timm.create_model(name, **{**shape, **more, **kwargs}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def vit(**kwargs):
    return make("class token", **kwargs)


def explicit(remainder, c):
    """(r,): the bias of the last tokens, by hand."""
    return torch.cat([torch.full((count,), c * torch.tensor(float(area)).log()) for count, area in AREAS[remainder]])


class AddToKeys(TorchFunctionMode):
    """Attention with a bias of the last keys, in any model: what the area bias must equal."""

    def __init__(self, bias):
        super().__init__()
        self.bias, self.calls = bias, 0

    def of(self, length):
        self.calls += 1
        return F.pad(self.bias, (length - len(self.bias), 0))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            mask, given = self.of(args[1].shape[-2]), kwargs.get("attn_mask")
            kwargs["attn_mask"] = mask.expand(args[0].shape[-2], -1) if given is None else given + mask
        elif func in (torch.Tensor.softmax, torch.softmax, F.softmax):
            args = (args[0] + self.of(args[0].shape[-1]), *args[1:])
        return func(*args, **kwargs)


class Masks(TorchFunctionMode):
    """The masks that fused attention gets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append((kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


@families
@remainders
@torch.no_grad()
def test_area_bias_is_an_explicit_mask(family, remainder):
    model = collapse(make(family), "bayer", keep=20, remainder=remainder)
    images = IMAGES.double()
    model.double()
    with AddToKeys(explicit(remainder, 0.7).double()) as reference:
        expected = model.forward_features(images, order=ORDER)
    assert reference.calls
    model.area_bias = 0.7
    features = model.forward_features(images, order=ORDER)
    assert torch.allclose(features, expected, atol=1e-6)
    model.area_bias = 0.0
    assert not torch.allclose(model.forward_features(images, order=ORDER), expected, atol=1e-3)
    if remainder in ("coarse", "split"):  # no whole numbers
        return
    model.area_bias = 1.0  # the head: as if of copies
    features, logits = model.forward_features(images, order=ORDER), model(images, order=ORDER)
    counts = torch.cat([torch.full((n,), area) for n, area in AREAS[remainder]])
    copies = features.repeat_interleave(F.pad(counts, (features.shape[1] - len(counts), 0), value=1), 1)
    model.area_bias = 0.0
    assert torch.allclose(logits, model.forward_head(copies), atol=1e-6)


@families
@torch.no_grad()
def test_no_bias_is_bit_for_bit_what_it_was(family):
    model = collapse(make(family), "bayer", keep=20, remainder="mixed")
    assert model.area_bias == 0
    with Masks() as before:
        expected = model(IMAGES, order=ORDER)
    if "beit" not in family:
        assert before.seen and all(mask is None for mask in before.seen)
    model.area_bias = 0.5
    assert not torch.equal(model(IMAGES, order=ORDER), expected)
    with Masks() as none:  # without a remainder all tokens stand for themselves
        model.remainder = "none"
        model(IMAGES, order=ORDER)
    assert all(mask is None for mask in none.seen) or "beit" in family
    model.remainder, model.keep = "mixed", 1
    plain = model(IMAGES)
    model.area_bias = 0
    assert torch.equal(model(IMAGES), plain)
    model.keep = 20
    assert torch.equal(model(IMAGES, order=ORDER), expected)


@torch.no_grad()
def test_attention_stays_fused_and_the_mask_is_one_a_pass():
    model = collapse(vit(), "bayer", keep=20, remainder="mixed", area_bias=0.5)
    with Masks() as masks:
        model(IMAGES)
    assert [tuple(mask.shape) for mask in masks.seen] == 2 * [(1, 1, 1, 20)] and masks.seen[0] is masks.seen[1]
    with Masks() as masks, torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
    assert len(masks.seen) == 2
    low = collapse(vit(), "bayer", keep=20, remainder="mixed", area_bias=0.5).bfloat16()
    with Masks() as masks:
        assert low(IMAGES.bfloat16()).isfinite().all()
    assert masks.seen[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["class token", "average pool", "attention pool", "naflex", "naflex attention pool"])
@torch.no_grad()
def test_a_token_of_area_m_is_m_identical_tokens(family):
    """Without positions, patches that are alike may as well be one token: the output is that of the whole image."""
    none = {"pos_embed": "none"} if "naflex" not in family else {"pos_embed": "none", "rope_type": "none"}
    plain, model = make(family, **none).double(), make(family, **none).double()
    model.load_state_dict(plain.state_dict())
    collapse(model, "bayer", keep=9, remainder="fused", area_bias=1)
    images = IMAGES.double()
    first = ORDER.keep(8)
    tiles = images[:1, :, :8, :8].repeat(2, 1, 8, 8)  # all patches but the first eight are alike
    chosen = torch.zeros(2, 64).scatter(1, first, 1.0).view(2, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = torch.where(chosen.bool(), images, tiles)
    whole = plain.forward_features(images)
    features, prefix = model.forward_features(images, order=ORDER), plain.num_prefix_tokens
    kept = whole[:, prefix:].gather(1, first.unsqueeze(-1).expand(-1, -1, 32))
    assert torch.allclose(features[:, : prefix + 8], torch.cat([whole[:, :prefix], kept], 1), atol=1e-6)
    assert torch.allclose(model(images, order=ORDER), plain(images), atol=1e-6)
    model.area_bias = 0.5
    assert not torch.allclose(model(images, order=ORDER), plain(images), atol=1e-3)
    one = IMAGES[:, :, :1, :1].double().expand(-1, -1, 64, 64)  # of one colour: cells of any size are alike
    for remainder, share in (("mixed", 0.5), ("mixed", 0.1), ("coarse", 1.0), ("zoom", 0.3)):
        model.remainder, model.coarse_share, model.keep, model.area_bias = remainder, share, 22, 1.0
        assert torch.allclose(model(one, order=ORDER), plain(one), atol=1e-6)


@pytest.mark.parametrize("family", ["average pool", "attention pool", "beit", "eva rope"])
@torch.no_grad()
def test_the_head_called_by_itself_counts_areas_too(family):
    model = collapse(make(family, **({"global_pool": "avg"} if family == "beit" else {})), "bayer", keep=20)
    for remainder in ("none", *AREAS):
        model.remainder, model.area_bias = remainder, 0.6
        assert torch.equal(model.forward_head(model.forward_features(IMAGES)), model(IMAGES))
    model.keep = 1
    whole = model.forward_features(IMAGES)
    expected = model.forward_head(whole)
    model.keep = 20  # of as many tokens as there are patches, none stands for several
    assert torch.equal(model.forward_head(whole), expected)


@torch.no_grad()
def test_the_head_of_a_model_of_any_size_needs_the_grid():
    model = collapse(make("dynamic size"), "bayer", keep=20, remainder="mixed", area_bias=0.5)
    wide = F.interpolate(IMAGES, (64, 128))
    logits = model(wide)
    with pytest.raises(CollapseError, match="area_bias must be 0 where forward_head is called by itself"):
        model.forward_head(model.forward_features(wide))
    model.keep = 1
    assert not torch.equal(model.forward_head(model.forward_features(wide)), logits)


@pytest.mark.parametrize("family", ["class token", "eva rope", "beit", "naflex"])
@torch.no_grad()
def test_intermediates_have_the_bias(family):
    model = collapse(make(family), "bayer", keep=20, remainder="mixed", area_bias=0.5)
    final, maps = model.forward_intermediates(IMAGES, order=ORDER, norm=True)
    assert torch.allclose(final, model.forward_features(IMAGES, order=ORDER), atol=1e-5)
    first = maps[0]
    model.area_bias = 0
    assert not torch.allclose(model.forward_intermediates(IMAGES, order=ORDER, norm=True)[1][0], first, atol=1e-3)


@pytest.mark.parametrize("family", ["class token", "eva rope", "naflex", "beit"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = collapse(make(family), "bayer", keep=20, remainder="coarse", area_bias=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        model(IMAGES, order=ORDER).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compile_export_and_trace():
    cases = {"average pool": "mixed", "attention pool": "coarse", "beit": "fused", "class token": "zoom"}
    for family, remainder in cases.items():
        model = collapse(make(family), "variance", keep=20, remainder=remainder, area_bias=0.5)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for c in (0.5, 0.0, 0.7):
            model.area_bias = c
            assert torch.allclose(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
        exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        traced = torch.jit.trace(model, (IMAGES,), check_trace=False)
        more = IMAGES.repeat(2, 1, 1, 1)
        for graph in (exported, traced):
            assert torch.allclose(graph(more), model(more), rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


# -- transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"image_size": 64, "patch_size": 8}
HF = ["ViTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "SiglipVisionModel", "CLIPVisionModel"]


def hf(name, kernel="sdpa"):
    if name == "PerceiverForImageClassificationLearned":
        config = transformers.PerceiverConfig(num_latents=4, d_latents=16, image_size=8, num_self_attends_per_block=1)
        return transformers.PerceiverForImageClassificationLearned(config).eval()
    text = {**SMALL, "vocab_size": 99}
    kwargs = {"vision_config": SMALL, "text_config": text} if name.startswith(("CLIP", "Siglip")) else SMALL
    config = getattr(transformers, name.partition("Model")[0].removesuffix("Vision") + "Config")(**kwargs)
    config = getattr(config, "vision_config", config)
    config._attn_implementation = kernel
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_transformers_against_an_explicit_mask(name, kernel):
    model, images = collapse(hf(name, kernel), "bayer", keep=20, remainder="mixed").double(), IMAGES.double()
    unbiased = model(images, order=ORDER)
    with AddToKeys(explicit("mixed", 0.7).double()) as reference:
        expected = model(images, order=ORDER)
    assert reference.calls >= 2
    model.area_bias = 0.7
    for _ in range(2):  # collapsed again
        found = model(images, order=ORDER)
        assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-6)
        assert not torch.allclose(found.pooler_output, unbiased.pooler_output, atol=1e-4)
        collapse(model, "bayer", keep=20, remainder="mixed", area_bias=0.7)
    model.area_bias = 0
    assert torch.equal(model(images, order=ORDER).last_hidden_state, unbiased.last_hidden_state)


@torch.no_grad()
def test_siglip_pools_copies():
    model = collapse(hf("SiglipVisionModel"), "bayer", keep=20, remainder="mixed", area_bias=1.0).double()
    out = model(IMAGES.double(), order=ORDER)
    counts = torch.cat([torch.full((n,), area) for n, area in AREAS["mixed"]])
    copies = out.last_hidden_state.repeat_interleave(F.pad(counts, (8, 0), value=1), 1)
    assert torch.allclose(model.head(copies), out.pooler_output, atol=1e-6)


@pytest.mark.parametrize("name", HF)
def test_transformers_recomputed_layers_and_compiled_models(name):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = collapse(hf(name), "bayer", keep=20, remainder="mixed", area_bias=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IMAGES, order=ORDER).last_hidden_state.square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    if name in ("DINOv3ViTModel", "SiglipVisionModel"):
        model = collapse(hf(name), "bayer", keep=20, remainder="mixed", area_bias=0.5)
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager")
            found, expected = compiled(IMAGES), model(IMAGES)
        assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


# -- settings


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "1", True])
def test_wrong_values_are_refused_and_change_nothing(wrong):
    model = collapse(vit(), "bayer", area_bias=0.5)
    for call in (
        lambda: setattr(model, "area_bias", wrong),
        lambda: collapse(model, "variance", area_bias=wrong),
        lambda: collapse(vit(), "bayer", area_bias=wrong),
    ):
        with pytest.raises(CollapseError, match="area_bias must be at least 0 and finite, got"):
            call()
    with pytest.raises(CollapseError, match="area_bias must be at least 0 and finite, got None"):
        model.area_bias = None
    assert model.area_bias == 0.5 and model.orderer.baseline_name == "bayer"


def test_models_that_cannot_take_it_say_why():
    shape = {key: TINY[key] for key in ("img_size", "embed_dim", "depth", "num_heads")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hybrid's stem
        hybrid = timm.create_model("vit_small_r26_s32_224", **shape)
        cases = {
            "talking heads": timm.create_model("cait_xxs24_224", **shape),
            "pooling, avgmax,": vit(global_pool="avgmax"),
            "pooling, prr,": vit(global_pool="prr", class_token=True),
            "whole images only": hybrid,
            "Perceiver": hf("PerceiverForImageClassificationLearned"),
            "attn_implementation is flex_attention": hf("ViTModel", "flex_attention"),
        }
        for reason, model in cases.items():
            cls = type(model)
            with pytest.raises(CollapseError, match=f"area_bias must be 0, got 0.5: .*{reason}"):
                collapse(model, "bayer", area_bias=0.5)
            assert type(model) is cls
            collapse(model, "bayer", area_bias=0)
            with pytest.raises(CollapseError, match=f"area_bias must be 0, got 0.5: .*{reason}"):
                model.area_bias = 0.5
            assert model.area_bias == 0
    model = collapse(vit(global_pool="avg"), "bayer", keep=20, remainder="mixed", area_bias=0.5)
    model.reset_classifier(5, "avgmax")
    with pytest.raises(CollapseError, match="pooling, avgmax,"):
        model(IMAGES)


def test_it_is_saved_with_the_model(tmp_path):
    model = timm.create_model("cvit_tiny_patch16", **TINY, orderer="bayer", remainder="mixed", keep=20, area_bias=0.5)
    assert model.area_bias == 0.5
    model.area_bias, model.coarse_share = 0.7, 0.75  # what is set later is saved, too
    save_for_hf(model.eval(), str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (loaded.area_bias, loaded.coarse_share, loaded.remainder, loaded.keep) == (0.7, 0.75, "mixed", 20)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    twin = with_orderer(model, "variance")
    assert (twin.area_bias, twin.coarse_share) == (0.7, 0.75)
    assert timm.create_model("cvit_tiny_patch16", **TINY, orderer="bayer", remainder="mixed").area_bias == 0
