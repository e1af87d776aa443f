import copy
import inspect
import pickle

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_collapse import CollapseError, CollapseOrder, Order, collapse
from timm_collapse.collapse.base import Collapsed
from timm_collapse.collapse.hf import trunk

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
PREFIX = {"ViT": 1, "Dinov2": 1, "Dinov2WithRegisters": 5, "DINOv3ViT": 3, "Siglip": 0, "CLIP": 1}
HEADS = [f"{part}ForImageClassification" for part in ("ViT", "Dinov2", "Dinov2WithRegisters", "Siglip", "CLIP")]
TRUNKS = [f"{part}Model" for part in [*PREFIX][:4]] + ["SiglipVisionModel", "CLIPVisionModel"]
every = pytest.mark.parametrize("name", [*TRUNKS, "CLIPVisionModelWithProjection", *HEADS])
each_trunk = pytest.mark.parametrize("name", TRUNKS)
both_sizes = pytest.mark.parametrize("size", [(32, 32), (24, 48)])
each_head = pytest.mark.parametrize("name", HEADS)


def family(name: str) -> str:
    return name.removesuffix("WithProjection").removesuffix("ForImageClassification").removesuffix("Model")


def build(name: str):
    """A tiny model whose weights are large enough that every token matters."""
    kwargs = {"vision_config": SMALL, "text_config": TEXT} if family(name) in ("CLIP", "Siglip") else SMALL
    registers = {"num_register_tokens": 2} if family(name) == "DINOv3ViT" else {}
    config = getattr(transformers, f"{family(name)}Config")(**kwargs, **registers, num_labels=3)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def prefix(name: str) -> int:
    return PREFIX[family(name).removesuffix("Vision")]


def same(a, b) -> bool:
    """Whether two outputs of transformers are the same, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else all(map(torch.equal, x, y))
        for x, y in zip(a.values(), b.values())
    )


class Refusing(CollapseOrder):
    def forward(self, *args, **kwargs):
        raise AssertionError("an order was computed")


def small_ranker() -> CollapseOrder:
    return CollapseOrder(timm.create_model("collapse_ranker_tiny", img_size=16, patch_size=4, dim=32, depth=1, rank=8))


def seen(part, call, *args, **kwargs):
    """What a part of a model returns while the model is called."""
    outputs = []
    handle = part.register_forward_hook(lambda module, args, output: outputs.append(output))
    call(*args, **kwargs)
    handle.remove()
    return outputs[0]


def interpolated(name: str, size) -> dict:
    fixed = not name.startswith(("Dinov2", "DINOv3"))
    return {"interpolate_pos_encoding": True} if fixed and size != (32, 32) else {}


@every
@both_sizes
def test_kept_tokens_are_those_of_a_forward_that_masks_the_dropped_ones(name, size, monkeypatch):
    model, images, p = build(name), torch.randn(2, 3, *size), prefix(name)
    grid, kwargs = (size[0] // 8, size[1] // 8), interpolated(name, size)
    order = Order(torch.rand(2, grid[0] * grid[1]), grid)
    kept = order.keep(0.25)
    index = torch.cat([torch.arange(p).expand(2, -1), kept + p], 1)
    mask = torch.full((2, 1, 1, p + grid[0] * grid[1]), float("-inf")).scatter(3, index[:, None, None], 0.0)
    attention = nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, *args, **kwargs):
        return attention(query, key, value, mask, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", masked)
        expected = model(images, output_hidden_states=True, **kwargs).hidden_states
    assert collapse(model, Refusing("raster"), keep=0.25, remainder="none") is model and isinstance(model, Collapsed)
    hidden = model(images, order=order, output_hidden_states=True, **kwargs).hidden_states
    assert len(hidden) == len(expected) == 3
    for ours, theirs in zip(hidden, expected):
        theirs = theirs.gather(1, index.unsqueeze(-1).expand(-1, -1, 32))
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


@every
def test_keeping_all_is_the_plain_model_bit_for_bit_without_an_order(name):
    model, images = build(name), torch.randn(2, 3, 32, 32)
    keys = list(model.state_dict())
    plain = model(images, output_hidden_states=True)
    collapse(model, Refusing("raster"), keep=1, remainder="none")
    assert same(model(images, output_hidden_states=True), plain)
    assert list(model.state_dict()) == keys
    model.keep = 0.5
    with pytest.raises(AssertionError, match="an order was computed"):
        model(images)
    model.keep = 1.0
    assert same(model(pixel_values=images, output_hidden_states=True), plain)  # nothing was left of the failed pass


@each_trunk
def test_keep_changes_at_run_time_and_dropped_patches_are_not_embedded(name):
    model, images = collapse(build(name), "gradient", keep=0.25, remainder="none"), torch.randn(2, 3, 32, 32)
    order = model.compute_order(images)
    for keep, count in ((0.25, 4), (0.5, 8), (3, 3), (1.0, 16), (0.1, 2)):
        model.keep = keep
        with FlopCounterMode(display=False) as counter:
            tokens = model(images).last_hidden_state
        assert tokens.shape[1] == prefix(name) + count
        assert torch.equal(tokens, model(images, order=order).last_hidden_state)
        convolved = any("conv" in str(op) for op in counter.get_flop_counts()["Global"])
        assert convolved == (count == 16)
    dropped = images.clone()
    places = (~order.mask(0.1)).view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    dropped[places.expand(-1, 3, -1, -1)] = float("nan")
    assert torch.equal(model(dropped, order=order).last_hidden_state, tokens)


@each_trunk
@both_sizes
def test_a_fused_token_is_the_mean_of_the_dropped_embeddings(name, size):
    model, images, p = build(name), torch.randn(2, 3, *size), prefix(name)
    grid, kwargs = (size[0] // 8, size[1] // 8), interpolated(name, size)
    order = Order(torch.rand(2, grid[0] * grid[1]), grid)
    plain = seen(trunk(model).embeddings, model, images, **kwargs)[:, p:]
    collapse(model, "raster", keep=6, remainder="fused")
    tokens = seen(trunk(model).embeddings, model, images, order=order, **kwargs)
    assert tokens.shape[1] == p + 6
    mean = (plain * ~order.mask(5).unsqueeze(-1)).sum(1) / (plain.shape[1] - 5)
    assert torch.allclose(tokens[:, -1], mean, atol=1e-5)


@each_trunk
def test_coarse_tokens_stand_for_their_cells(name):
    model, p = build(name), prefix(name)
    images = torch.randn(2, 3, 1, 1).expand(-1, -1, 32, 32)  # one colour: a coarse patch looks like a fine one
    plain = seen(trunk(model).embeddings, model, images)[:, p:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    collapse(model, Refusing("raster"), keep=4, remainder="coarse", coarse_share=1)
    assert torch.allclose(seen(trunk(model).embeddings, model, images)[:, p:], plain, atol=1e-5)
    collapse(model, "raster", keep=8, remainder="coarse")
    assert torch.allclose(seen(trunk(model).embeddings, model, images)[:, -4:], plain, atol=1e-5)
    assert model(images).last_hidden_state.shape[1] == p + 8


@each_head
def test_heads_read_the_kept_tokens(name):
    model, images, p = (
        collapse(build(name), "halton", keep=0.5, remainder="none"),
        torch.randn(2, 3, 32, 32),
        prefix(name),
    )
    tokens = seen(trunk(model), model, images).last_hidden_state
    output = model(pixel_values=images, labels=torch.tensor([0, 2]))
    mean = tokens[:, p:].mean(1)
    if family(name).startswith("Dinov2"):
        mean = torch.cat([tokens[:, 0], mean], 1)
    pooled = tokens[:, 0] if family(name) == "ViT" else mean
    assert tokens.shape[1] == p + 8 and torch.allclose(output.logits, model.classifier(pooled), atol=1e-5)
    expected = nn.functional.cross_entropy(output.logits, torch.tensor([0, 2]))
    assert torch.allclose(output.loss, expected, atol=1e-6)


@each_head
def test_training_reaches_the_model_and_not_the_orderer(name):
    model = collapse(build(name), small_ranker(), keep=0.5, remainder="fused").train()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    # Trainer drops every other column
    assert {"pixel_values", "labels", "order"} <= inspect.signature(model.forward).parameters.keys()
    model.requires_grad_(True)
    grads = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert not any(key.startswith("orderer.") for key in grads[0]) and not model.orderer.training
    unused = {key for key, _ in model.named_parameters() if not key.startswith("orderer.")} - grads[0].keys()
    assert all("mask_token" in key or ".head." in key or "vision_model.post_layernorm" in key for key in unused)
    assert all(torch.allclose(grads[0][key], grads[1][key], atol=1e-6) for key in grads[0])


@every
def test_checkpoints_are_plain(name, tmp_path):
    model, images = build(name), torch.randn(2, 3, 32, 32)
    plain = model(images)
    model.save_pretrained(tmp_path / "plain")
    collapse(model, small_ranker(), keep=0.25, remainder="none").save_pretrained(tmp_path / "collapsed")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "collapsed" / file).read_bytes()
    loaded = type(build(name)).from_pretrained(tmp_path / "collapsed")
    assert not isinstance(loaded, Collapsed) and same(loaded(images), plain)
    again = collapse(loaded, "gradient", keep=0.25, remainder="none")
    order = model.compute_order(images)
    assert same(again(images, order=order), model(images, order=order))
    assert not model.load_state_dict(again.state_dict()).missing_keys


@every
def test_copies_and_pickles_are_independent(name):
    model, images = collapse(build(name), "gradient", keep=0.25, remainder="coarse"), torch.randn(1, 3, 32, 32)
    output = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and same(other(images), output)
        other.keep = 0.5
        assert not same(other(images), output) and same(model(images), output)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3ViTModel"])
def test_it_compiles_in_one_graph(name):
    model, images = collapse(build(name), "gradient", keep=0.25, remainder="fused"), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images)[0], model(images)[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, remainder", [("ViTModel", "none"), ("DINOv3ViTModel", "coarse"), ("CLIPVisionModel", "fused")]
)
def test_an_exported_model_takes_any_batch(name, remainder):
    model = collapse(build(name), "variance", keep=0.5, remainder=remainder)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    exported = torch.export.export(model, (), images, dynamic_shapes=shapes).module()
    for batch in (5, 1):
        images = torch.randn(batch, 3, 32, 32)
        assert torch.allclose(exported(pixel_values=images)[0], model(images)[0], atol=1e-5)


@pytest.mark.parametrize(
    "name, mean, std", [("ViT", 0.5, 0.5), ("Dinov2", 0.485, 0.229), ("CLIPVision", 0.4815, 0.2686)]
)
def test_the_orderer_gets_images_in_its_own_normalisation(name, mean, std):
    images, inputs = torch.randn(2, 3, 32, 32), []
    orderers = CollapseOrder.baseline("gradient"), small_ranker()
    for orderer in orderers:
        orderer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model = collapse(build(f"{name}Model"), orderers[0], keep=0.5, remainder="none")
    model(images)
    collapse(model, orderers[1], keep=0.5, mean=(0.2,) * 3, std=(0.1,) * 3, remainder="none")(images.half())
    assert torch.allclose(inputs[0][:, 0], (images[:, 0] * std + mean - 0.5) / 0.5, atol=1e-3)
    expected = (images[:, 0] * 0.1 + 0.2 - orderers[1].mean[0]) / orderers[1].std[0]
    assert inputs[1].dtype == torch.float32 and torch.allclose(inputs[1][:, 0], expected, atol=1e-2)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_dual_encoders_use_their_collapsed_tower(name, tmp_path):
    model, images = build(f"{name}Model"), torch.randn(2, 3, 32, 32)
    keys, plain = list(model.state_dict()), model.vision_model(images)
    tower = collapse(model.vision_model, "gradient", keep=0.25, remainder="none")
    output = seen(tower, model.get_image_features, pixel_values=images)
    assert output.last_hidden_state.shape[1] == prefix(f"{name}Model") + 4
    assert torch.equal(output.last_hidden_state, tower(images).last_hidden_state)
    assert model(pixel_values=images, input_ids=torch.tensor([[3, 4, 5]])).logits_per_image.shape == (2, 1)
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    assert same(type(model).from_pretrained(tmp_path).vision_model(images), plain)


def test_wrong_inputs_are_named():
    images, order = torch.randn(2, 3, 32, 32), Order(torch.rand(2, 16), (4, 4))
    vit, dino = (collapse(build(name), "raster", keep=0.5, remainder="none") for name in ("ViTModel", "Dinov2Model"))
    masked = torch.zeros(2, 16, dtype=torch.bool)
    for call, message in (
        (lambda: vit(images, order=order[0]), "2 images of the batch"),
        (lambda: vit(images, order=Order(order.scores, (2, 8))), r"grid \(4, 4\)"),
        (lambda: vit(images, order=order.scores), "order must be an Order"),
        (lambda: vit(images, masked), "bool_masked_pos"),
        (lambda: dino(images, bool_masked_pos=masked, order=order), "bool_masked_pos"),
        (lambda: vit(images, attention_mask=torch.ones(2, 17)), "attention_mask"),
        (lambda: vit(torch.randn(2, 3, 40, 40)), "image_size"),
        (lambda: dino(torch.randn(2, 3, 7, 32)), "at least one patch"),
        (lambda: vit(), "pixel_values"),
        (lambda: setattr(vit, "keep", 0), "keep"),
    ):
        with pytest.raises(CollapseError, match=message):
            call()
    vit.keep = 1
    assert torch.isfinite(vit(images, attention_mask=torch.ones(2, 17)).last_hidden_state).all()


def test_models_that_cannot_be_collapsed_are_refused_with_the_reason():
    swin = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2)
    convnext = transformers.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1])
    whole, hooked = build("ViTForImageClassification"), build("ViTModel")
    collapse(whole.vit, "raster", keep=0.5, remainder="none")
    hooked.forward = hooked.forward
    for model, message in (
        (transformers.SwinModel(swin), "SwinModel.*supported are ViTModel"),
        (transformers.BeitModel(transformers.BeitConfig(**SMALL)), "BeitModel.*supported are ViTModel"),
        (transformers.ConvNextModel(convnext), "ConvNextModel.*supported are ViTModel"),
        (transformers.Dinov2Backbone(transformers.Dinov2Config(**SMALL)), "maps of the whole grid"),
        (build("CLIPModel"), "CLIPModel.*model.vision_model"),
        (build("SiglipModel"), "SiglipModel.*model.vision_model"),
        (whole, "collapsed already"),
        (hooked, "forward method of ViTModel was replaced"),
    ):
        with pytest.raises(CollapseError, match=message):
            collapse(model, "raster")
        assert not isinstance(model, Collapsed)
