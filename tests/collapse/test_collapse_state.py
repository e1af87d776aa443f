"""A collapsed model as a module: precision, the meta device, freezing, saving; and the orderer that it holds."""

import copy
import pickle

import accelerate
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from timm_collapse import CollapseError, CollapseOrder, collapse
from timm_collapse.collapse.base import Collapsed
from timm_collapse.evaluation import count_macs
from timm_collapse.hub.save import save_model, save_orderer

SHAPE = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
RANKER = "collapse_ranker_tiny"


def cvit(**kwargs):
    return timm.create_model("cvit_tiny_patch8", **{**SHAPE, "keep": 0.5, "orderer": RANKER, **kwargs}).eval()


def timm_vit():
    return timm.create_model("vit_tiny_patch16_224", patch_size=8, **SHAPE).eval()


def hf_vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make", [lambda: timm.create_model("vit_tiny_patch16_224", patch_size=8, **SHAPE).eval(), hf_vit]
)
def test_half_precision_runs_and_orders_as_float32(make, dtype):
    orderer = CollapseOrder.from_pretrained(RANKER)
    whole = orderer(IMAGES).ranks
    for cast_first in (True, False):
        model = make().to(dtype) if cast_first else make()
        collapse(model, copy.deepcopy(orderer), keep=0.5, remainder="coarse").to(dtype)
        output = logits(model(IMAGES.to(dtype)))
        assert output.dtype == dtype and output.isfinite().all()
        ranks = model.orderer(IMAGES.to(dtype)).ranks
        assert ((ranks < 16) & (whole < 16)).sum() >= 0.75 * 2 * 16
    assert CollapseOrder.from_pretrained("comae_tiny").to(dtype)(IMAGES.to(dtype)).scores.isfinite().all()


def test_models_from_the_meta_device_have_their_orderer(tmp_path):
    model = cvit()
    expected, state = model(IMAGES), model.state_dict()
    with torch.device("meta"):
        built = cvit()
    with accelerate.init_empty_weights():
        empty = cvit()
    moved = copy.deepcopy(model).to("meta")
    for other in (built, empty, moved):
        other = copy.deepcopy(other).to_empty(device="cpu")
        other.load_state_dict(state)
        assert torch.equal(other(IMAGES), expected)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(loaded(IMAGES), expected)


def test_meta_tensors_get_shapes_and_the_orderer_is_counted():
    model = cvit()
    macs = count_macs(lambda: model(IMAGES))
    model.to("meta")
    assert model(IMAGES.to("meta")).shape == (2, 5)
    assert count_macs(lambda: model(IMAGES.to("meta"))) == pytest.approx(macs, rel=0.02)
    with torch.device("meta"):
        nameless = CollapseOrder(timm.create_model(RANKER))
    with pytest.raises(CollapseError, match="orderer: the weights of this Ranker are on the meta device"):
        nameless(IMAGES)


@pytest.mark.parametrize("make", [cvit, lambda: collapse(hf_vit(), RANKER, keep=0.5, remainder="none")])
def test_nothing_that_walks_the_model_finds_the_orderer(make):
    model = make()
    timm.utils.unfreeze(model)
    for parameter in model.parameters():
        parameter.requires_grad = True
    model.apply(lambda module: [nn.init.zeros_(p) for p in module.parameters(recurse=False)])
    own = model.orderer.parameters()
    assert not any(p.requires_grad for p in own) and any((p != 0).any() for p in model.orderer.parameters())
    assert not any("orderer" in name for name, _ in [*model.named_modules(), *model.named_parameters()])
    assert not any("orderer" in name for name in model.state_dict())
    inside = {id(module) for module in model.orderer.modules()}
    assert not inside & {id(module) for module in model.modules()} and "CollapseOrder(Ranker, grid" in repr(model)


def test_an_assigned_orderer_is_used_and_collapsing_again_frees_it():
    model = cvit()
    model.orderer = CollapseOrder.baseline("raster")
    assert model.compute_order(IMAGES).indices[0].tolist() == list(range(64))
    collapse(model, "bayer", keep=0.5, remainder="none")
    assert model.orderer.baseline_name == "bayer" and "orderer" not in model._modules


def test_copies_have_an_orderer():
    model = cvit()
    expected = model(IMAGES)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), expected)
        other.keep = 0.25
        assert model.keep == 0.5 and model._model_args["keep"] == 0.5 and torch.equal(model(IMAGES), expected)


def test_a_quantized_model_keeps_its_order():
    model = cvit()
    with pytest.warns(Warning):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(quantized.compute_order(IMAGES).ranks, model.compute_order(IMAGES).ranks)
    assert quantized(IMAGES).shape == (2, 5)


def test_orderers_load_from_local_dir(tmp_path):
    orderer = CollapseOrder.from_pretrained(RANKER, spread=0.5)
    save_orderer(orderer, tmp_path)
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        loaded = CollapseOrder.from_pretrained(name)
        assert loaded.spread == 0.5 and torch.equal(loaded(IMAGES).scores, orderer(IMAGES).scores)
    with pytest.raises(CollapseError, match="no folder"):
        CollapseOrder.from_pretrained(f"local-dir:{tmp_path}/none")


def test_any_collapsed_vit_is_saved_as_one(tmp_path):
    for name, save in (("deit3_small_patch16_224", timm.models.save_for_hf), ("eva02_tiny_patch14_224", save_model)):
        shape = {**SHAPE, "img_size": 56 if "14" in name else 64}
        model = collapse(timm.create_model(name, **shape).eval(), "variance", keep=0.3, remainder="none")
        model.keep, images = 0.4, IMAGES[..., : shape["img_size"], : shape["img_size"]]
        save(model, str(tmp_path / name), **({"safe_serialization": True} if save is not save_model else {}))
        loaded = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert isinstance(loaded, Collapsed) and (loaded.keep, loaded.orderer.baseline_name) == (0.4, "variance")
        assert type(loaded) is type(model) and torch.equal(loaded(images), model(images))
    own = timm.create_model("cvit", base="vit_tiny_patch16_224", orderer="bayer", **SHAPE)
    assert own.orderer.baseline_name == "bayer" and own.pretrained_cfg["architecture"] == "cvit"


def test_settings_that_change_later_are_saved(tmp_path):
    model = cvit(orderer="variance")
    model.keep, model.remainder, model.coarse_share = 0.25, "coarse", 0.75
    timm.models.save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert (loaded.keep, loaded.remainder, loaded.coarse_share) == (0.25, "coarse", 0.75)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    save_model(cvit(orderer=CollapseOrder.baseline("raster")), tmp_path / "given")
    assert timm.create_model(f"local-dir:{tmp_path / 'given'}").orderer.baseline_name == "raster"


def test_save_pretrained_says_that_it_writes_the_plain_model(tmp_path):
    with pytest.warns(UserWarning, match="writes the plain model"):
        collapse(hf_vit(), "bayer", keep=0.5, remainder="none").save_pretrained(tmp_path)


class Orders(Dataset):
    """The first patches of "random" orders, drawn where the images are loaded."""

    orderer = CollapseOrder.baseline("random")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.orderer(torch.zeros(1, 3, 8, 8), (8, 8)).indices[0]


def test_random_orders_differ_in_workers_and_epochs_and_repeat_with_the_seed():
    def epochs():
        torch.manual_seed(3)
        loader = DataLoader(Orders(), batch_size=2, num_workers=2)
        return [torch.cat(list(loader)) for _ in range(2)]

    drawn = torch.cat(epochs())
    assert len(drawn.unique(dim=0)) == 16 and torch.equal(torch.cat(epochs()), drawn)
    seeded = [CollapseOrder.baseline("random", seed=3)(IMAGES, (4, 4)).scores for _ in range(2)]
    assert torch.equal(*seeded)


def test_channels():
    images, ranker = torch.randn(2, 4, 64, 64), CollapseOrder.from_pretrained(RANKER)
    for name in ("random", "raster", "bayer", "variance", "centre_variance", "gradient"):
        order = CollapseOrder.baseline(name)
        assert not order.needs_colour and all(len(order(images[:, :c], (8, 8))) == 2 for c in (1, 4))
    for orderer in (ranker, CollapseOrder.from_pretrained("comae_tiny")):
        grey = images[:, :1]
        assert orderer.needs_colour
        assert torch.equal(orderer(grey).scores, orderer(grey.expand(-1, 3, -1, -1)).scores)
        with pytest.raises(CollapseError, match="images must have 3 channels .* got a float32 tensor"):
            orderer(images)
