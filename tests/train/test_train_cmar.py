"""CMAR's training in miniature, through the script: digits, a token a pixel, a random VAE."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from distributed_worker import load_script
from safetensors.torch import load_file

from timm_collapse import CollapseError, GenerationOrder
from timm_collapse.engine import run_script
from timm_collapse.hub.files import BANK_FILE
from timm_collapse.models import load_codec
from timm_collapse.order import tokens_per_step

ROOT = Path(__file__).parents[2]
SIZES = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 32,
         "decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 1, "diffloss_w": 32, "patch_size": 2,
         "num_sampling_steps": 5}  # fmt: skip
COMMON = ["--dataset", "digits", "--model_args", json.dumps(SIZES), "--orderer", "variance", "--tensorboard", "false",
          "--log_every", "1", "--batch_size", "8"]  # fmt: skip
"""16 tokens of 2 x 2 pixels."""
RECIPE = ["--steps", 60, "--batch_size", 32, "--lr", "3e-3", "--bank_per_class", 4, "--ema", 0.9, "--jitter", 0.05,
          "--random_orders", 0.2, "--mask_ratio", "cosine", "--mask_ratio_min", 0.3]  # fmt: skip


def command(output: Path, *args: str) -> list[str]:
    return [sys.executable, str(ROOT / "train" / "cmar.py"), *COMMON, "--output", str(output), *map(str, args)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


def train(output: Path, *args) -> None:
    done = subprocess.run(command(output, *args), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def script():
    return load_script("cmar")


@pytest.fixture
def train_here(script, monkeypatch, capsys):
    """The same without a process, which takes seconds to start; returns what was printed."""

    def train_here(output: Path, *args, code: int = 0) -> str:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", command(output, *args)[1:])
        if code:
            with pytest.raises(SystemExit) as stopped:
                run_script(script.main)
            assert stopped.value.code == code
        else:
            run_script(script.main)
        return "".join(capsys.readouterr())

    return train_here


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def load(folder: Path):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 60 steps."""
    folder = tmp_path_factory.mktemp("cmar") / "run"
    train(folder, *RECIPE)
    return folder


@pytest.mark.slow
def test_loss_falls_and_the_saved_model_generates_along_its_bank(trained):
    log = log_of(trained)
    assert [line["step"] for line in log] == list(range(1, 61))
    assert all(line["loss"] == pytest.approx(line["mse"] + line["bound"], rel=1e-4) for line in log)
    first, last = (sum(line["loss"] for line in lines) / 10 for lines in (log[:10], log[-10:]))
    assert last < 0.9 * first
    mar = load(trained)
    assert (mar.grid, mar.token_dim, mar.num_classes, mar.num_sampling_steps) == ((4, 4), 12, 10, 5)
    assert mar.bank.grid == (4, 4) and mar.bank.num_classes == 10 and mar.bank.ranks.shape == (10, 4, 16)
    assert int(mar.bank.seen.sum()) == 1437 and "variance" in mar.bank.source  # digits are not mirrored
    labels, known = torch.arange(10), []
    latents = mar.generate(labels, steps=4, guidance_scale=2.0, callback=lambda step, so_far, mask: known.append(mask),
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    images = load_codec(mar.vae).decode(latents)
    assert images.shape == (10, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
    generator = torch.Generator().manual_seed(0)
    torch.randn(10, 16, 12, generator=generator)  # the start noise comes before the order
    order = GenerationOrder(mar.bank, mar.grid)(labels, generator)
    assert torch.equal(known[0], order.ranks < int(known[0][0].sum()))
    recipe = json.loads((trained / "recipe.json").read_text())
    assert recipe["arguments"]["orderer"] == "variance" and recipe["arguments"]["steps"] == 60


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights_and_log(trained, tmp_path):
    arguments = [*RECIPE, "--checkpoint_minutes", 0]
    broken = subprocess.Popen(command(tmp_path, *arguments), env=environment(), stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert broken.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert not (tmp_path / "model.safetensors").exists()  # it was in mid-training
    train(tmp_path, *arguments)
    for name in ("model.safetensors", BANK_FILE):
        whole, resumed = load_file(trained / name), load_file(tmp_path / name)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert log_of(trained) == log_of(tmp_path)


def test_random_orders_need_no_bank_and_another_run_goes_on_from_the_weights(trained, train_here, tmp_path):
    common = ["--steps", 2, "--ema", 0, "--latents", trained / "latents", "--orderer", "random"]
    train_here(tmp_path / "mar", *common, "--model", "mar_mini_patch1_8", "--init", trained, "--lr", 0)
    assert not (tmp_path / "mar" / BANK_FILE).exists() and not (tmp_path / "mar" / "orders").exists()
    mar, start = load(tmp_path / "mar"), load(trained)
    assert mar.bank is None
    assert all(torch.equal(value, mar.state_dict()[name]) for name, value in start.state_dict().items())  # lr 0
    wrong = json.dumps({**SIZES, "encoder_embed_dim": 64})
    said = train_here(tmp_path / "other", *common, "--init", trained, "--model_args", wrong, code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "init: " in errors[0] and "of another size: fake_latent (1, 32) instead of" in errors[0]
    assert "Traceback" not in said and not (tmp_path / "other" / "model.safetensors").exists()


def test_trains_on_the_latents_of_a_vae(train_here, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    sizes = {**SIZES, "vae_stride": 2, "vae_embed_dim": 4, "patch_size": 1, "latent_bound": 0.0, "vae_scale": 0.5}
    arguments = ["--vae", tmp_path / "vae", "--part", "0/20", "--steps", 2]
    train_here(tmp_path / "run", *arguments, "--model_args", json.dumps(sizes))
    mar = load(tmp_path / "run")
    assert mar.vae == str(tmp_path / "vae") and mar.latent_shape == (4, 4, 4) and mar.bank.grid == (4, 4)
    images = load_codec(mar.vae, 0.5).decode(mar.generate([3], steps=2))
    assert images.shape == (1, 3, 8, 8)
    said = train_here(tmp_path / "wrong", *arguments, code=2)  # a model of pixels
    assert "error: vae: " in said and "has 4 channels and stride 2" in said and "Traceback" not in said


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mask_ratio": "normal"}, "mask_ratio: must be truncnorm, cosine or uniform, got 'normal'"),
        ({"mask_ratio_min": 1.0}, r"mask_ratio_min: must be in \[0, 1\), got 1.0"),
        ({"mask_ratio_min": -0.5}, r"mask_ratio_min: must be in \[0, 1\), got -0.5"),
        ({"random_orders": -0.1}, r"random_orders: must be in \[0, 1\], got -0.1"),
        ({"random_orders": 1.5}, r"random_orders: must be in \[0, 1\], got 1.5"),
        ({"jitter": -1.0}, "jitter: must be at least 0, got -1.0"),
        ({"bank_per_class": -1}, "bank_per_class: must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(script, wrong, message):
    with pytest.raises(CollapseError, match=message):
        script.Args(**wrong)


def test_wrong_mask_ratio_on_the_command_line_is_told_before_anything_is_made(train_here, tmp_path):
    said = train_here(tmp_path / "run", "--mask_ratio", "normal", code=2)
    assert "error: mask_ratio: must be truncnorm" in said and not (tmp_path / "run").exists()


def test_only_matrices_of_the_transformer_decay(script):
    mar = timm.create_model("mar_mini_patch1_8", **SIZES)
    names = {id(p): name for name, p in mar.named_parameters()}
    decay, no_decay = script.parameter_groups(mar, 0.02)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.02, 0.0)
    decayed = {names[id(p)] for p in decay["params"]}
    assert decayed | {names[id(p)] for p in no_decay["params"]} == set(names.values())
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert "encoder_blocks.0.mlp.fc1.weight" in decayed and "class_emb.weight" in decayed
    assert not any(name.startswith("diffloss") or name.endswith("bias") for name in decayed)


def test_masks_of_a_sampling_step(script):
    """With predict_steps every training step is one step of the sampler's plan."""

    class Steps:
        number = 0

        def randint(self, low: int, high: int) -> int:
            assert (low, high) == (0, 5)
            self.number += 1
            return self.number - 1

    args, random, plan = script.Args(predict_steps=5), Steps(), tokens_per_step(16, 5)
    for step, predicted in enumerate(plan):
        assert script.counts(args, random, 16) == (16 - sum(plan[:step]), predicted)
    assert script.Args().predict_steps == 0 and script.Args(init="x").predict_steps == 16
    assert script.Args(init="x", orderer="random").predict_steps == 0
