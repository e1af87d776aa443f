"""The benchmark of adapted ViTs: its classifier, the trainings that it starts, its table; nothing is trained here."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from distributed_worker import load_script
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from timm_collapse.engine import parse_args

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import adapt_vit  # noqa: E402
from vit_probe import first_blocks, linear_probe  # noqa: E402


def test_a_probe_is_logistic_regression_of_standardised_features():
    features = torch.randn(60, 5) * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0]) + 3
    labels = torch.tensor([0, 2, 3]).repeat(20)
    probe = linear_probe(features, labels, 5)
    standard = StandardScaler().fit_transform(features)
    expected = LogisticRegression(C=0.1, max_iter=500).fit(standard, labels).decision_function(standard)
    logits = probe(features)
    assert torch.allclose(logits[:, [0, 2, 3]], torch.as_tensor(expected).float(), atol=1e-4)
    assert (logits[:, [1, 4]] == -1e4).all()  # classes without an image


@pytest.fixture
def bench(here, monkeypatch):
    """Of a tiny ViT whose probe is made already."""
    monkeypatch.setattr(sys, "argv", ["adapt_vit.py", "--name", "it", "--model", "runs/vit", "--dataset", "digits"])
    return adapt_vit.Bench(adapt_vit.parse())


def test_the_start_is_a_saved_classifier_of_the_first_blocks(bench, monkeypatch):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
    monkeypatch.setattr(
        adapt_vit, "first_blocks",
        lambda *args, num_classes: timm.create_model("vit_tiny_patch16_224", **shape, depth=2, num_classes=num_classes),
    )  # fmt: skip
    bench.args.img_size, bench.args.probe, bench.args.precision = 16, 40, "no"
    folder = bench.start
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (len(vit.blocks), vit.num_classes, vit.patch_embed.grid_size) == (2, 10, (4, 4))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert bench.start == folder and (folder / "model.safetensors").stat().st_mtime_ns == written  # made once


VARIANTS = ["downscaled", "biased", "zoom", "mild_zoom", "split", "collapse", "none", "whole", "random", "bayer"]
VARIANTS += ["sizes", "downscaled_sizes", "zoom_sizes", "random_sizes", "sized"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainings_and_their_starts_have_the_same_settings(variant, bench, monkeypatch):
    monkeypatch.setattr(adapt_vit.Bench, "start", Path("runs/start"))
    args = parse_args(load_script("cvit").Args, "", bench.command(variant, 3))
    assert (args.seed, args.steps, args.keep, args.output) == (3, 100, "64", f"runs/adapt/it/{variant}_3")
    assert args.keep_schedule == ("full" if variant == "whole" else "64,128") and args.freeze == 5
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    plain = timm.create_model("vit_tiny_patch16_224", **shape)
    monkeypatch.setattr(adapt_vit, "collapse", lambda model, orderer, **settings: (orderer, settings))
    orderer, settings = bench.collapsed(plain, variant)
    name = "cells" if args.remainder[0] in ("split", "zoom") else "tiny"
    assert orderer == (args.orderer or f"collapse_ranker_{name}_224")
    assert settings["remainder"] == args.remainder[0] and settings["area_bias"] == args.area_bias
    assert settings["coarse_share"] == args.coarse_share[0]


def test_the_table():
    def at(**top1):
        return {name.removeprefix("k"): {"top1": value, "error": 1.0} for name, value in top1.items()}

    found = {
        "start": at(whole=70.0), "a|before": at(k64=50.0), "a|0": at(k64=60.0, whole=80.0),
        "b|before": at(k64=40.0), "b|0": at(k64=70.0, whole=81.0), "b|1": at(k64=72.0, whole=83.0),
        "b|step": {"seconds": 1.234, "macs": 5}, "c|before": at(k64=1.0),
    }  # fmt: skip
    rows = adapt_vit.rows_of(found)
    assert [list(row.values())[:4] for row in rows] == [
        ["b", "2", "40.0 -> 71.0 ± 1.0", "70.0 -> 82.0 ± 1.0"],
        ["a", "1", "50.0 -> 60.0", "70.0 -> 80.0"],
    ]
    assert adapt_vit.markdown_table(rows) and adapt_vit.crossed_text(found) == []
    found |= {"a|as b": at(k128=3.0, k64=2.25), "a|as c": at(k64=5.0, k128=6.0), "b|as b": at(k64=7.0, k128=8.0)}
    assert adapt_vit.crossed_rows(found) == [
        {"trained as": "a", "seen as b": "2.2 / 3.0", "seen as c": "5.0 / 6.0"},
        {"trained as": "b", "seen as b": "7.0 / 8.0", "seen as c": ""},
    ]
    assert adapt_vit.rows_of(found) == rows and len(adapt_vit.crossed_text(found)) == 2


def test_only_the_first_blocks(tmp_path, monkeypatch):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=3, num_heads=2)
    monkeypatch.setattr("vit_probe.timm.create_model", lambda *names, **kwargs: vit)
    assert len(first_blocks("it", 32, 0).blocks) == 3
    assert len(first_blocks("it", 32, 2).blocks) == 2 and not vit.training
