"""Every publishable model is described, and nothing in hub_configs/ names what does not exist."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from distributed_worker import load_script

from timm_collapse import CollapseError
from timm_collapse.collapse.cvit import BASES, RESAMPLED
from timm_collapse.data import open_dataset
from timm_collapse.engine import parse_args
from timm_collapse.evaluation.report import read_section
from timm_collapse.hub.config import derive_config, is_derivable, read_config
from timm_collapse.hub.download import bundled_models

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "hub_configs").glob("*.json"))}
NO_VAE = {"comae_base_kl16_256": {"vae": ""}, "comae_base_kl16_256_wide_encoder": {"vae": ""}}


def test_every_publishable_model_has_its_file():
    ours = {name for name in timm.list_models() if name.startswith(("comae_", "collapse_ranker", "cvit_", "cmar_"))}
    configs = [read_config(path) for path in CONFIGS.values()]
    derived = {name for name in ours if is_derivable(name)}
    assert derived == {*BASES, *RESAMPLED} and {config.architecture for config in configs} | derived == ours
    judges = {name for name in bundled_models() if name.startswith("collapse_reconstructor")}  # they only measure
    assert judges and set(bundled_models()) - judges <= {config.checkpoint for config in configs}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_names_only_what_there_is(name):
    config = read_config(CONFIGS[name])
    known = set(config.__dataclass_fields__) - {"name", "folder"}
    assert set(json.loads(CONFIGS[name].read_text())) <= known
    check_config(name, config)


@pytest.mark.parametrize("name", [*BASES, *RESAMPLED])
def test_a_collapsed_model_of_timm_needs_no_file(name):
    config = read_config(name)
    check_config(name, config)
    check_commands(config)
    if name in CONFIGS:
        assert config == dataclasses.replace(read_config(CONFIGS[name]), folder=Path())


def check_config(name, config):
    """It names only what there is."""
    assert config.name == name and config.name.startswith(config.architecture)
    with torch.device("meta"):
        model = timm.create_model(config.architecture, **config.model_args, **NO_VAE.get(name, {}))
    assert sum(p.numel() for p in model.parameters()) > 0
    if config.architecture in {**BASES, **RESAMPLED}:
        assert timm.is_model(config.base_model.removeprefix("timm/").split(".")[0])
        assert timm.get_pretrained_cfg(config.checkpoint).hf_hub_id == config.base_model
        assert (config.license == "other") == ("dinov3" in name)
    assert all(read_section(section, ROOT / "docs" / "results.md") for section in config.results)
    assert config.summary.endswith(".") and len(config.summary) > 40


@pytest.mark.parametrize("name", CONFIGS)
def test_the_training_commands_parse(name):
    check_commands(read_config(CONFIGS[name]))


def check_commands(config):
    """Its commands are understood by the scripts that they name."""
    for command in config.train:
        words = shlex.split(command)
        assert words[:2] == ["accelerate", "launch"]
        if words[2] == "--config_file":
            assert yaml.safe_load((ROOT / words[3]).read_text())["num_processes"] >= 1
            del words[2:4]
        script = ROOT / words[2]
        args = parse_args(load_script(script.stem).Args, "", words[3:])  # exits where an argument does not exist
        known = {field.name: field.default for field in dataclasses.fields(args)}
        assert args.output != known["output"]
        if getattr(args, "model", ""):
            assert timm.is_model(args.model.split(".")[0])
        if args.dataset == "digits":
            open_dataset(args.dataset)


def test_a_wrong_file_is_one_clear_error(tmp_path):
    good = json.loads(CONFIGS["cvit_tiny_patch4_32"].read_text())
    cases = {
        "architecture: .* names 'vit_enormous', which is not registered": {"architecture": "vit_enormous"},
        "task: must be one of image-classification, .* got 'chat'": {"task": "chat"},
        "checkpoint: .* names 'cvit_tiny_patch4_32.mnist', which has no weights": {
            "checkpoint": "cvit_tiny_patch4_32.mnist"
        },
        "config: .* must have .*got .*'speed'": {"speed": "fast"},
        "config: train of .* must be list": {"train": "accelerate launch"},
        "config: datasets of .* must be list": {"datasets": [1]},
    }
    path = tmp_path / "bad.json"
    for message, change in cases.items():
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CollapseError, match=message):
            read_config(path)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "summary"}))
    with pytest.raises(CollapseError, match="must have .*'summary'"):
        read_config(path)
    for text, message in (("{", "is no JSON"), ("[]", "must have")):
        path.write_text(text)
        with pytest.raises(CollapseError, match=message):
            read_config(path)
    with pytest.raises(CollapseError, match="is no file"):
        read_config(tmp_path / "missing.json")
    with pytest.raises(CollapseError, match="'cmar_base' is no collapsed model with timm's weights"):
        derive_config("cmar_base")
