"""--dry_run: what it tells is true, and nothing stays of it."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from distributed_worker import load_script
from PIL import Image

from timm_collapse.data import LatentCache
from timm_collapse.engine import NoiseCodec, TrainArgs, run_script
from timm_collapse.engine.dry_run import DryRun
from timm_collapse.evaluation import count_macs
from timm_collapse.hub.save import save_model

MAR = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 32,
       "decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 1, "diffloss_w": 32, "patch_size": 2}  # fmt: skip
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
GRID = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1}


@pytest.fixture
def dry_run(monkeypatch, capsys, tmp_path):
    """Runs a script; returns its report and what it told the user."""

    def dry_run(name: str, *arguments) -> tuple[dict, str]:
        (tmp_path / "temporary").mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        common = ["--dataset", "digits", "--dry_run", "true", "--output", tmp_path / "output"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, [*common, *arguments])])
        run_script(load_script(name).main)
        assert not (tmp_path / "output").exists() and not list((tmp_path / "temporary").iterdir())
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err

    return dry_run


def test_cmar(dry_run):
    report, told = dry_run("cmar", "--model_args", json.dumps(MAR), "--orderer", "variance", "--batch_size", 8,
                           "--steps", 100, "--init", "no/such/model", "--order_table", "no/table")  # fmt: skip
    model = timm.create_model("cmar_mini_patch1_8", **MAR)
    count = sum(p.numel() for p in model.parameters())
    assert (report["parameters_trained"], report["parameters_frozen"]) == (count, 0)
    memory = report["memory_bytes"]
    assert memory["weights"] == memory["gradients"] == memory["ema"] == 4 * count
    assert 8 * count <= memory["optimizer"] <= 8 * count + 8 * len(list(model.parameters()))  # and the steps
    assert memory["activations"] > 0 and memory["sum"] == sum(memory.values()) - memory["sum"]
    assert report["memory_peak_bytes"] is None and report["device"] == "cpu"
    assert (report["images_per_step"], report["steps_per_epoch"], report["steps"]) == (8, 180, 100)  # 1437 images
    assert report["seconds_in_all"] == pytest.approx(100 * report["seconds_per_step"])
    assert report["images_per_second"] == pytest.approx(8 / report["seconds_per_step"])
    assert "--init is ignored" in told and "throughput" in told and "Traceback" not in told


def test_macs_are_those_of_the_middle_of_the_schedule(dry_run):
    arguments = ["--model", "cvit_tiny_patch4_32", "--model_args", json.dumps(VIT), "--orderer", "bayer"]
    arguments += ["--batch_size", 4, "--grad_accum", 2]
    report, _ = dry_run("cvit", *arguments, "--keep_schedule", "uniform")
    vit = timm.create_model("cvit_tiny_patch4_32", orderer="bayer", keep=1 - 0.99 / 2, num_classes=10, **VIT)
    assert report["macs_per_image"] == count_macs(lambda: vit(torch.randn(1, 3, 32, 32)))
    assert (report["images_per_step"], report["steps_per_epoch"]) == (8, 180)
    more, _ = dry_run("cvit", *arguments, "--keep_schedule", "full", "--order_table", "made/up")
    assert more["macs_per_image"] > 1.5 * report["macs_per_image"]
    assert more["memory_bytes"]["activations"] > 1.3 * report["memory_bytes"]["activations"]
    assert more["images_per_epoch"] == 1437  # though a few were ordered


def test_frozen_parts_are_counted_apart(dry_run):
    report, _ = dry_run("cvit", "--model", "cvit_tiny_patch4_32", "--model_args", json.dumps(VIT), "--batch_size", 2,
                        "--orderer", "collapse_ranker_tiny", "--pretrained", "true", "--ema", 0)  # fmt: skip
    orderer = timm.create_model("collapse_ranker_tiny")
    assert report["parameters_frozen"] == sum(p.numel() for p in orderer.parameters())
    assert report["memory_bytes"]["ema"] == 0
    assert report["memory_bytes"]["weights"] >= 4 * (report["parameters_trained"] + report["parameters_frozen"])


def test_activations_are_what_the_backward_pass_needs(tmp_path):
    """Of a layer without bias and a square: its input, and what is squared; the weight is no activation."""
    args = TrainArgs(output=str(tmp_path), batch_size=7, tensorboard=False)
    measured = DryRun(args, torch.nn.Linear(10, 20, bias=False), [(torch.randn(10), 0)] * 7)
    for x, _ in measured:
        measured.step(measured.model(x).square().sum())
    assert measured.saved_bytes == 4 * (7 * 10 + 7 * 20)
    assert measured.macs == 10 * 20


@pytest.mark.parametrize("name", ["reconstructor", "comae", "ranker"])
def test_the_other_scripts(dry_run, name, tmp_path):
    more = {"decoder_dim": 32, "decoder_depth": 1}
    size, arguments = {**GRID, **more}, []
    if name == "ranker":
        save_model(timm.create_model("collapse_reconstructor_tiny", **size), tmp_path / "environment")
        size, arguments = {**GRID, "rank": 8}, ["--reconstructor", tmp_path / "environment"]
    report, _ = dry_run(name, "--model_args", json.dumps(size), "--batch_size", 4, *arguments)
    assert report["macs_per_image"] > 0 and report["parameters_trained"] > 0 and report["seconds_per_step"] > 0


def test_latents_are_noise_where_a_vae_would_be_needed(dry_run, tmp_path):
    sizes = {**MAR, "vae": "no/such-vae", "vae_stride": 2, "vae_embed_dim": 4, "patch_size": 1, "latent_bound": 0.0}
    report, told = dry_run("cmar", "--model_args", json.dumps(sizes), "--orderer", "bayer", "--batch_size", 4)
    assert report["macs_per_image"] > 0 and "latents are noise, the VAE 'no/such-vae' is not loaded" in told
    dataset = [(Image.new("RGB", (8, 8)), 1)] * 3
    cache = LatentCache.build(tmp_path / "cache", dataset, NoiseCodec((4, 4, 4), 8), 8, "x", quiet=True)
    noise = torch.randn(3, 4, 4, 4)
    records = torch.stack([cache[i][0] for i in range(3)])
    assert torch.allclose(cache.latents(records, torch.zeros(3, dtype=torch.bool), noise), noise)


def test_the_temporary_folder_goes_where_a_run_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ranker", "--dry_run", "true", "--reconstructor", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        run_script(load_script("ranker").main)
    assert not list(Path(tmp_path).iterdir()) and "Traceback" not in capsys.readouterr().err
