"""What a MAR is read from: official torch files, safetensors, our own folders with their order bank; never blindly."""

import argparse
import os
import random
import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_collapse import ClassOrderBank, CollapseError, Order
from timm_collapse.hub.files import BANK_FILE
from timm_collapse.hub.mar_checkpoints import infer_config, load_mar, load_mar_weights, read_mar_checkpoint
from timm_collapse.hub.save import save_model
from timm_collapse.models import MAR

SMALL_MAR = runpy.run_path(str(Path(__file__).parents[1] / "models" / "mar_small.py"))
SMALL, random_mar = SMALL_MAR["SMALL"], SMALL_MAR["random_mar"]
KNOWN = {"encoder_num_heads": 4, "decoder_num_heads": 3, "vae_stride": 2}
"""What the tensors do not tell."""


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file as the reference's training writes it, its model and its EMA model."""
    torch.manual_seed(0)
    mar, ema = random_mar(), random_mar()
    optimizer = torch.optim.AdamW(mar.parameters(), betas=(0.9, 0.95))
    mar(torch.randn(2, 4, 4, 4), torch.tensor([0, 1]))["loss"].backward()
    state = {k: v.clone() for k, v in mar.state_dict().items()}
    optimizer.step()
    args = argparse.Namespace(model="mar_base", lr=None, ema_rate=0.9999, grad_checkpointing=True, dist_url="env://")
    path = tmp_path_factory.mktemp("official") / "checkpoint-last.pth"
    content = {"model": state, "model_ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 799,
               "args": args}  # fmt: skip
    torch.save(content, path)
    return path, state, ema.state_dict()


def test_official_files_give_the_ema_weights_by_default(official):
    path, state, ema = official
    assert same(read_mar_checkpoint(path), ema) and same(read_mar_checkpoint(str(path), ema=False), state)
    mar = random_mar()
    load_mar_weights(mar, path)
    assert same(mar.state_dict(), ema)
    load_mar_weights(mar, path, ema=False)
    assert same(mar.state_dict(), state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for this one reading only


def test_model_from_a_file_alone(official):
    path, _, ema = official
    loaded = load_mar(path, **KNOWN)
    assert not loaded.training and same(loaded.state_dict(), ema)
    expected = MAR(**SMALL).eval()
    expected.load_state_dict(ema)
    options = dict(steps=3, diffusion_steps=3, guidance_scale=2.0)
    found = [mar.generate([4], generator=torch.Generator().manual_seed(0), **options) for mar in (loaded, expected)]
    assert torch.equal(*found)


def test_files_of_one_state_and_other_layouts(official, tmp_path):
    _, state, ema = official
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state}, tmp_path / "model.pth")
    torch.save({"model_ema": ema}, tmp_path / "ema.pth")
    torch.save({"model": state, "model_ema": ema}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "model.safetensors")
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    for name in ("plain.pt", "model.pth", "model.safetensors", "."):  # the last one is a folder
        assert same(read_mar_checkpoint(tmp_path / name), state)
    assert same(read_mar_checkpoint(tmp_path / "ema.pth", ema=False), ema)  # it has nothing else
    assert same(read_mar_checkpoint(tmp_path / "old.pth"), ema)
    mar = random_mar()
    load_mar_weights(mar, tmp_path / "half.safetensors")
    assert mar.mask_token.dtype == torch.float32
    assert all((mar.state_dict()[k] - state[k]).abs().max() < 2e-3 for k in state)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.", "model.model."]
)
def test_files_of_a_model_inside_wrappers(official, tmp_path, prefix):
    _, state, ema = official
    wrapped, wrapped_ema = ({prefix + name: value for name, value in each.items()} for each in (state, ema))
    save_file(wrapped, tmp_path / "mar.safetensors")
    torch.save({"model": wrapped, "model_ema": wrapped_ema}, tmp_path / "mar.pth")
    for file, expected in (("mar.safetensors", state), ("mar.pth", ema)):
        assert same(read_mar_checkpoint(tmp_path / file), expected)
        assert same(load_mar(tmp_path / file, **KNOWN).state_dict(), expected)


def test_files_of_other_trainers(official, tmp_path):
    _, state, _ = official
    inside = {name.replace("_blocks.1.", "_blocks.1._checkpoint_wrapped_module."): state[name] for name in state}
    lightning = {"loss.weight": torch.zeros(1), **{f"model.{name}": value for name, value in state.items()}}
    for content in ({"module": state}, {"state_dict": lightning, "epoch": 3}, inside):
        torch.save(content, tmp_path / "mar.ckpt")
        assert same(read_mar_checkpoint(tmp_path / "mar.ckpt"), state)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_configuration_of_the_published_models_is_told_from_their_tensors(size):
    with torch.device("meta"):
        published = timm.create_model(f"mar_{size}")
        config = infer_config(published.state_dict())
        rebuilt = MAR(**config)
    shapes = {name: value.shape for name, value in published.state_dict().items()}
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == shapes
    assert [b.attn.num_heads for b in (rebuilt.encoder_blocks[0], rebuilt.decoder_blocks[-1])] == [
        {"base": 12, "large": 16, "huge": 16}[size]
    ] * 2
    assert (config["img_size"], config["vae_stride"], config["patch_size"], config["class_num"]) == (256, 16, 1, 1000)
    assert published.encoder_blocks[0].attn.num_heads == rebuilt.encoder_blocks[0].attn.num_heads


@pytest.mark.parametrize("changes", [{}, {"class_num": 0}, {"patch_size": 2}, {"vae_stride": 1}])
def test_configuration_of_small_models(changes):
    expected = {**SMALL, "patch_size": 1, **changes}
    known = {**KNOWN, "vae_stride": expected["vae_stride"], "vae_embed_dim": 4}
    found = infer_config(MAR(**expected).state_dict(), **known)
    assert found == {name: expected[name] for name in found}


# -- what is refused ---------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_is_refused_and_does_not_run(official, tmp_path):
    _, state, _ = official
    command = f"touch {tmp_path / 'executed'}"
    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": state, "args": Malicious(command)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CollapseError, match="init: .*is damaged or holds more than tensors"):
            read_mar_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


def test_other_sizes_are_refused_naming_tensors(official, tmp_path):
    path, state, _ = official
    before = random_mar(encoder_embed_dim=64)
    kept = {k: v.clone() for k, v in before.state_dict().items()}
    with pytest.raises(
        CollapseError, match=r"does not fit.*; of another size: fake_latent \(1, 32\) instead of \(1, 64\), .* \.\.\.$"
    ):
        load_mar_weights(before, path)
    assert same(before.state_dict(), kept)  # nothing was loaded
    with pytest.raises(CollapseError, match=r"missing: encoder_blocks.2.attn.proj.bias, .* \.\.\."):
        load_mar_weights(random_mar(encoder_depth=3), path)
    with pytest.raises(CollapseError, match="not known: class_emb.weight"):
        load_mar_weights(random_mar(class_num=0), path)
    torch.save({k: v for k, v in state.items() if k != "mask_token"} | {"other": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CollapseError, match="missing: mask_token; not known: other$"):
        load_mar(tmp_path / "a.pth", **KNOWN)


def test_truncated_and_damaged_files_are_told(official, tmp_path):
    path, state, _ = official
    save_file(state, tmp_path / "whole.safetensors")
    torch.save({"model": state}, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    rng = random.Random(0)
    for source, name in (
        (path, "a.pth"),
        (tmp_path / "whole.safetensors", "a.safetensors"),
        (tmp_path / "whole.pt", "a.pt"),
    ):
        data = source.read_bytes()
        for damaged in (
            b"",
            data[:1],
            data[:100],
            data[: len(data) // 2],
            data[:-100],
            rng.randbytes(1000),
            b"\x80\x02",
        ):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(CollapseError, match=f"init: .*{name}' is damaged or holds more than tensors: ."):
                read_mar_checkpoint(tmp_path / name)


def test_what_is_no_mar_is_told(tmp_path):
    with pytest.raises(
        CollapseError, match="init: .*nowhere.pth' is neither a file nor a folder with model.safetensors"
    ):
        read_mar_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CollapseError, match="init: .* is neither a file nor a folder"):
        read_mar_checkpoint(tmp_path)
    for content in (
        torch.zeros(3),
        {"weight": torch.zeros(3)},
        {"model": 3},
        {"model": {"z_proj.weight": "text"}},
        [1],
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(CollapseError, match="init: .*other.pth' holds no MAR"):
            read_mar_checkpoint(tmp_path / "other.pth")
    save_file({"weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    with pytest.raises(CollapseError, match="init: .*vae.safetensors' holds no MAR"):
        load_mar(tmp_path / "vae.safetensors")


# -- our own files -----------------------------------------------------------------------------------------------------


def small_bank(grid, classes) -> ClassOrderBank:
    length = grid[0] * grid[1]
    indices = torch.stack([torch.arange(length).roll(3 * label) for label in range(classes)])
    return ClassOrderBank.build([(Order.from_indices(indices, grid), torch.arange(classes))], classes, source="rolled")


def test_saved_models_come_back_with_their_order_bank(tmp_path):
    options = dict(class_num=4, encoder_depth=1, decoder_depth=1, img_size=4)
    mar = timm.create_model("cmar_mini_patch1_8", **options).eval()
    assert mar.bank is None
    with torch.no_grad():
        for parameter in mar.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(mar, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.bank is None and (loaded.grid, loaded.num_classes, loaded.vae) == ((4, 4), 4, "pixels")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in mar.state_dict().items())
    small_bank((4, 4), 4).save(tmp_path / BANK_FILE)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.bank.source == "rolled" and torch.equal(loaded.bank.ranks, small_bank((4, 4), 4).ranks)
    options = dict(steps=5, generator=torch.Generator().manual_seed(0), noise=torch.randn(2, 16, 3))
    found = loaded.generate([1, 3], **options)
    options["generator"].manual_seed(0)
    given = torch.stack([torch.arange(16).roll(3), torch.arange(16).roll(9)])
    torch.rand(2, generator=options["generator"])  # the draw from the bank
    assert torch.equal(found, mar.generate([1, 3], order=given, **options))
    assert not torch.allclose(found, mar.generate([1, 3], order=given.flip(0), **options))
    small_bank((2, 2), 4).save(tmp_path / BANK_FILE)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).bank.grid == (4, 4)  # resampled
    assert timm.create_model(f"local-dir:{tmp_path}").bank is None


def test_timms_num_classes_is_the_number_of_classes():
    assert timm.create_model("mar_mini_patch1_8", num_classes=7).class_emb.num_embeddings == 7
    unconditional = timm.create_model("mar_mini_patch1_8", num_classes=0, encoder_depth=1, decoder_depth=1)
    assert unconditional.class_emb is None and "class_emb.weight" not in unconditional.state_dict()
    images = unconditional.eval().generate(torch.tensor([99, -5]), steps=2, diffusion_steps=2)  # only counted
    assert images.shape == (2, 3, 8, 8)
