import json

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_collapse  # noqa: F401
from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.hub.download import WEIGHTS
from timm_collapse.hub.save import load_weights, save_model
from timm_collapse.models.registry import load_model

SMALL = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1}
MODELS = {
    "collapse_ranker_tiny": {**SMALL, "phases": (0.0, 0.5)},
    "comae_tiny": {**SMALL, "decoder_dim": 32, "decoder_depth": 1, "recipe": "paper"},
    "collapse_reconstructor_tiny": {**SMALL, "decoder_dim": 32, "decoder_depth": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_local_dir_round_trip_is_exact(name, tmp_path):
    model = timm.create_model(name, **MODELS[name]).eval()
    save_model(model, tmp_path, recipe={"lr": 1.0}, measured=0.5)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)
    images = torch.randn(2, 3, 16, 16)
    if name != "collapse_reconstructor_tiny":
        a, b = CollapseOrder(model), CollapseOrder.from_pretrained(str(tmp_path))
        assert torch.equal(a(images).scores, b(images).scores) and a.mean == b.mean
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["arguments"] == {"lr": 1.0} and recipe["measured"] == 0.5


def test_half_weights_are_half_and_load(tmp_path):
    model = timm.create_model("collapse_ranker_tiny", **SMALL)
    save_model(model, tmp_path, half=True)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.allclose(loaded.embed.weight, model.embed.weight, atol=1e-3)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_model(timm.create_model("collapse_ranker_tiny", **SMALL), tmp_path)
    with pytest.raises(CollapseError, match="init.*do not fit"):
        load_weights(timm.create_model("collapse_ranker_tiny", **{**SMALL, "dim": 64}), tmp_path)
    load_weights(
        timm.create_model("collapse_ranker_tiny", **{**SMALL, "img_size": 32}), tmp_path
    )  # positions are relative


def test_a_bank_of_another_model_does_not_stay(tmp_path):
    model = timm.create_model("cmar_mini_patch1_8", pretrained=True)
    save_model(model, tmp_path)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).bank is not None
    model.bank = None
    save_model(model, tmp_path)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).bank is None


def test_broken_folders_are_one_clear_error(tmp_path):
    with pytest.raises(CollapseError, match="could not be loaded"):
        CollapseOrder.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CollapseError, match="could not be loaded"):
        CollapseOrder.from_pretrained(str(tmp_path))


def test_models_are_registered():
    assert {"comae_tiny", "comae_base_kl16_256", "comae_base_kl16_256_wide_encoder"} <= set(timm.list_models("*comae*"))
    assert "collapse_ranker_tiny_224.photos" in timm.list_models("collapse_*", pretrained=True)


@pytest.mark.parametrize("folder", sorted(p.name for p in WEIGHTS.iterdir() if p.is_dir()))
def test_bundled_weights_load_both_ways_and_fit_their_limits(folder):
    model = timm.create_model(folder, pretrained=True).eval()
    again = timm.create_model(f"local-dir:{WEIGHTS / folder}", pretrained=True).eval()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (WEIGHTS / folder / "model.safetensors").stat().st_size < 15e6
    assert "arguments" in json.loads((WEIGHTS / folder / "recipe.json").read_text())


def test_bundled_weights_fit_together():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*.safetensors")) < 40e6


def test_a_model_that_cannot_be_loaded_is_one_line_that_says_why(tmp_path):
    model = timm.create_model("collapse_ranker_tiny", **SMALL)
    save_model(model, tmp_path)
    for name in (tmp_path, f"local-dir:{tmp_path}"):
        loaded = load_model(name, "judge")
        assert not loaded.training and torch.equal(loaded.embed.weight, model.embed.weight)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    (tmp_path / "empty").mkdir()
    cases = (("vit_enormous", {}), (tmp_path, {}), (tmp_path / "empty", {}), ("vit_tiny_patch16_224", {"depths": 3}))
    for name, kwargs in cases:
        with pytest.raises(CollapseError, match=f"^judge: '{name}' could not be loaded: .+") as caught:
            load_model(name, "judge", pretrained=not kwargs, **kwargs)
        assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CollapseError, match="judge: .*could not be loaded: .*size mismatch for .* and [0-9]+ more$"):
        load_model(tmp_path, "judge", dim=64)
