"""Publish and load through the real client and the loopback Hub."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from timm_collapse import CollapseError, CollapseOrder, collapse
from timm_collapse.cli.main import build_parser, main
from timm_collapse.collapse.base import Collapsed
from timm_collapse.hub.config import read_config
from timm_collapse.hub.download import bundled_models
from timm_collapse.hub.publish import publish_folder, push
from timm_collapse.hub.save import save_model, save_orderer
from timm_collapse.models import MAR

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "hub_configs").glob("*.json"))}
BUNDLED = [name for name, path in CONFIGS.items() if read_config(path).checkpoint in bundled_models()]
RANKER = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "phases": (0.0, 0.5)}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def outputs(model):
    """What a model computes, for a bit-exact comparison."""
    side = model.pretrained_cfg["input_size"][1]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if isinstance(model, MAR):
            labels = [0, 1] if model.num_classes else 2
            return [model.generate(labels, 4, diffusion_steps=2, generator=torch.Generator().manual_seed(2))]
        if isinstance(model, Collapsed):
            return [model(images), model.compute_order(images).indices]
        return [CollapseOrder(model)(images).scores]


def assert_same(one, other):
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    for a, b in zip(outputs(one), outputs(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_model_is_the_same_after_publishing(name, hub, capsys, tmp_path):
    assert main(["publish", str(CONFIGS[name]), "--repo-id", f"me/{name}"]) == 0
    assert f"{hub.url}/me/{name}/commit/" in capsys.readouterr().out
    before = timm.create_model(read_config(CONFIGS[name]).checkpoint, pretrained=True).eval()
    after = timm.create_model(f"hf-hub:me/{name}", pretrained=True).eval()
    assert_same(before, after)
    assert after.pretrained_cfg["hf_hub_id"] == f"me/{name}" and not after.pretrained_cfg.get("file")
    files = hub.repos[f"me/{name}"].files()
    assert {"config.json", "model.safetensors", "recipe.json", "README.md"} <= set(files)
    assert not any(path.endswith((".bin", ".pth", ".pkl")) for path in files)
    (tmp_path / "weights").write_bytes(files["model.safetensors"])
    assert {v.dtype for v in load_file(tmp_path / "weights").values()} == {torch.float16}  # as the bundled ones
    if isinstance(before, MAR):
        assert torch.equal(before.bank.sample(torch.arange(3), torch.Generator().manual_seed(0)).indices,
                           after.bank.sample(torch.arange(3), torch.Generator().manual_seed(0)).indices)  # fmt: skip
    elif not isinstance(before, Collapsed):
        assert_same(before, CollapseOrder.from_pretrained(f"me/{name}").model)
    card = files["README.md"].decode()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    metadata = yaml.safe_load(head)
    assert (metadata["license"], metadata["library_name"]) == ("mit", "timm")
    assert all(
        text in body for text in ("## Use", "## Pictures", "accelerate launch train/", "2511.22281", f"me/{name}")
    )
    assert body.split("](")[1].split(")")[0] in files  # the picture that it shows
    for command in re.findall("^timm-collapse (.*)$", body, re.MULTILINE):
        build_parser().parse_args(shlex.split(command))  # exits where an argument does not exist
    assert isinstance(before, Collapsed) or "\ntimm-collapse " in body


def test_a_pretrained_cvit_is_timms_vit_from_timms_repository(hub, tmp_path):
    vit = timm.create_model("vit_base_patch16_224", **VIT).eval()
    timm.models.save_for_hf(vit, str(tmp_path), safe_serialization=True)
    names = ("config.json", "model.safetensors")
    repo = "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
    hub.add_repo(repo, {name: (tmp_path / name).read_bytes() for name in names})
    cvit = timm.create_model("cvit_base_patch16", pretrained=True, **VIT).eval()
    images = torch.randn(2, 3, 224, 224)
    assert not torch.equal(cvit(images), vit(images))
    cvit.keep = 1.0
    assert torch.equal(cvit(images), vit(images))
    assert cvit.orderer.model.pretrained_cfg["tag"] == "photos" and cvit.pretrained_cfg["hf_hub_id"] == repo
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("cvit_base_patch16", pretrained=True, **{**VIT, "embed_dim": 32})


@pytest.fixture
def cvit():
    """A small collapsed model whose orderer, of a ranking of its own, has no name."""
    model = timm.create_model("cvit_tiny_patch4_32", num_classes=3, keep=0.4, remainder="coarse", **VIT).eval()
    comae = timm.create_model("comae_tiny", img_size=16, patch_size=4, dim=32, depth=1, decoder_dim=32, decoder_depth=1)
    return collapse(model, CollapseOrder(comae, ranking="coverage"), 0.4, "coarse")


def published(model, hub, folder, repo_id="me/cvit", **kwargs):
    save_model(model, folder / "run", recipe={"lr": 1.0}, validation_top1={"1.0": 50.0, "0.4": 45.0})
    out = publish_folder(read_config(CONFIGS["cvit_tiny_patch4_32"]), folder / "out", repo_id, folder / "run")
    push(out, repo_id, **kwargs)
    return out


def test_an_orderer_of_ones_own_travels_with_its_model(cvit, hub, tmp_path):
    out = published(cvit, hub, tmp_path)
    loaded = timm.create_model("hf-hub:me/cvit", pretrained=True).eval()
    assert_same(cvit, loaded)
    assert (loaded.keep, loaded.remainder, loaded.orderer.ranking) == (0.4, "coarse", "coverage")
    assert_same(cvit, timm.create_model(f"local-dir:{out}", pretrained=True).eval())
    assert timm.create_model("hf-hub:me/cvit", pretrained=True, orderer="bayer").orderer.baseline_name == "bayer"
    orderer = CollapseOrder.from_pretrained("me/cvit/orderer")
    images = torch.rand(2, 3, 16, 16)
    assert orderer.ranking == "coverage" and torch.equal(orderer(images).scores, cvit.orderer(images).scores)
    save_model(loaded, tmp_path / "again")  # a model that was loaded can be saved and moved
    assert_same(cvit, timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval())
    head = hub.repos["me/cvit"].files()["README.md"].decode()
    assert "top-1 at keep 0.4" in head and "| top-1 | 50.0% | 45.0% |" in head


def test_transformers_loads_the_published_model(cvit, hub, tmp_path):
    from transformers import AutoModelForImageClassification, pipeline

    published(cvit, hub, tmp_path)
    model = AutoModelForImageClassification.from_pretrained("me/cvit").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=images).logits, cvit(images))
        assert torch.equal(model.timm_model.compute_order(images).indices, cvit.compute_order(images).indices)
    from PIL import Image
    from sklearn.datasets import load_sample_image

    found = pipeline("image-classification", "me/cvit")(Image.fromarray(load_sample_image("flower.jpg")))
    assert len(found) == 3 and abs(sum(one["score"] for one in found) - 1) < 1e-5


def test_private_branch_and_pull_request(cvit, hub, tmp_path):
    out = published(cvit, hub, tmp_path, private=True)
    repo = hub.repos["me/cvit"]
    assert repo.private
    first = repo.files()
    cvit.head.weight.data += 1
    save_model(cvit, out)
    push(out, "me/cvit", revision="trial")
    assert repo.files() == first and repo.files("trial")["model.safetensors"] != first["model.safetensors"]
    assert_same(cvit, timm.create_model("hf-hub:me/cvit@trial", pretrained=True).eval())
    address = push(out, "me/cvit", create_pr=True)
    assert address.endswith("/discussions/1") and repo.files() == first
    assert repo.files("refs/pr/1")["model.safetensors"] == repo.files("trial")["model.safetensors"]


def test_dry_run_sends_nothing(hub, tmp_path, capsys):
    config = str(CONFIGS["collapse_ranker_tiny"])
    assert main(["publish", config, "--repo-id", "me/r", "--dry-run", "--output", str(tmp_path / "r")]) == 0
    assert "nothing was sent" in capsys.readouterr().out and not hub.log
    assert CollapseOrder.from_pretrained(str(tmp_path / "r")).grid == (8, 8)


def test_bad_arguments_are_one_line(hub, tmp_path, capsys):
    config = str(CONFIGS["cvit_tiny_patch4_32"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    save_model(timm.create_model("collapse_ranker_tiny", **RANKER), tmp_path / "ranker")
    cases = {
        ("missing.json", "--repo-id", "me/x"): "config: 'missing.json' is no file",
        (config, "--repo-id", "x"): "--repo-id: must be ME/NAME, got 'x'",
        (config, "--repo-id", "me/x", "--checkpoint", str(tmp_path / "none")): "is neither a folder, a file, nor",
        (config, "--repo-id", "me/x", "--checkpoint", str(tmp_path / "ranker")): "is a collapse_ranker_tiny, cvit_tiny",
        (str(CONFIGS["cmar_base"]), "--repo-id", "me/x"): "checkpoint: cmar_base has no weights of its own",
        (config, "--repo-id", "me/x", "--dry-run", "--output", str(tmp_path / "full")): "holds other files",
        (config, "--repo-id", "you/x"): "hf auth login",
    }
    for arguments, message in cases.items():
        assert main(["publish", *arguments]) == 2
        out, err = capsys.readouterr()
        error = err.splitlines()[-1]
        assert message in error and error.startswith("timm-collapse: error: ") and not out, (arguments, err)
    assert not hub.repos


def test_offline_says_what_was_looked_for_where_and_what_is_bundled(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (
        lambda: timm.create_model("cvit_base_patch16", pretrained=True),
        lambda: CollapseOrder.from_pretrained("me/ranker"),
    ):
        with pytest.raises(CollapseError, match="pretrained: model.safetensors of .*local cache .*cvit_tiny_patch8_64"):
            load()
    with pytest.raises(CollapseError, match="cmar_base has no published weights"):
        timm.create_model("cmar_base", pretrained=True)


def test_what_was_loaded_once_loads_offline(cvit, hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    published(cvit, hub, tmp_path)
    main(["publish", str(CONFIGS["collapse_ranker_tiny"]), "--repo-id", "me/ranker"])
    timm.create_model("hf-hub:me/cvit", pretrained=True)
    ranker = CollapseOrder.from_pretrained("me/ranker")  # which has no settings beside it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.log)
    assert_same(cvit, timm.create_model("hf-hub:me/cvit", pretrained=True).eval())
    assert torch.equal(CollapseOrder.from_pretrained("me/ranker").model.embed.weight, ranker.model.embed.weight)
    assert len(hub.log) == requests


def test_pickled_weights_are_never_read(hub, tmp_path):
    model = timm.create_model("collapse_ranker_tiny", **RANKER)
    save_model(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    names = ("config.json", "pytorch_model.bin")
    hub.add_repo("me/pickled", {name: (tmp_path / name).read_bytes() for name in names})
    for load in (
        lambda: timm.create_model("hf-hub:me/pickled", pretrained=True),
        lambda: CollapseOrder.from_pretrained("me/pickled"),
    ):
        with pytest.raises(CollapseError, match="model.safetensors of 'me/pickled' could not be had"):
            load()
    assert not hub.matching("pytorch_model")


def test_weights_that_do_not_fit_are_refused(hub, tmp_path):
    model = timm.create_model("collapse_ranker_tiny", **RANKER)
    save_model(model, tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    state = model.state_dict()
    broken = {
        "missing": {k: v for k, v in state.items() if k != "embed.weight"},
        "extra": {**state, "more": torch.zeros(1)},
        "shape": {**state, "embed.weight": state["embed.weight"][:, :5].contiguous()},
    }
    for name, tensors in broken.items():
        save_file(tensors, tmp_path / "model.safetensors")
        weights = (tmp_path / "model.safetensors").read_bytes()
        hub.add_repo(f"me/{name}", {"config.json": config, "model.safetensors": weights})
        with pytest.raises(CollapseError, match="could not be loaded"):
            CollapseOrder.from_pretrained(f"me/{name}")
    hub.add_repo("me/half", {"config.json": config, "model.safetensors": weights[:-9]})
    with pytest.raises(CollapseError, match="could not be loaded"):
        CollapseOrder.from_pretrained("me/half")
    hub.add_repo("me/json", {"config.json": b"{", "model.safetensors": weights})
    with pytest.raises(CollapseError, match="could not be loaded"):
        CollapseOrder.from_pretrained("me/json")


def test_the_recipe_goes_along_without_the_paths_of_a_machine(cvit, hub, tmp_path):
    config = read_config(CONFIGS["cvit_tiny_patch4_32"])
    recipe = {"lr": 1.0, "dataset": "/home/someone/data/photos", "teacher": "local-dir:/home/someone/runs/t"}
    save_model(cvit, tmp_path / "run", recipe=recipe)
    out = publish_folder(config, tmp_path / "out", "me/cvit", tmp_path / "run")
    arguments = json.loads((out / "recipe.json").read_text())["arguments"]
    assert arguments == {"lr": 1.0, "dataset": "data/photos", "teacher": "local-dir:runs/t"}
    assert not any(b"someone" in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_pushed_run_takes_no_path_of_a_machine_along(cvit, hub, tmp_path):
    recipe = {"dataset": "/home/someone/data/photos", "init": {"from": ["/home/someone/runs/a"]}, "lr": 1.0}
    save_model(cvit, tmp_path / "run", recipe=recipe)
    save_orderer(cvit.orderer, tmp_path / "run" / "orderer")
    (tmp_path / "run" / "orderer" / "recipe.json").write_text(json.dumps({"arguments": recipe}))
    (tmp_path / "run" / "orderer" / "checkpoint.pt").write_bytes(b"optimizer of someone")
    push(tmp_path / "run", "me/cvit")
    files = hub.repos["me/cvit"].files()
    assert {"recipe.json", "orderer/recipe.json", "orderer/orderer.json", "model.safetensors"} <= files.keys()
    for name in ("recipe.json", "orderer/recipe.json"):
        arguments = json.loads(files[name])["arguments"]
        assert arguments == {"dataset": "data/photos", "init": {"from": ["runs/a"]}, "lr": 1.0}
    assert not any(b"someone" in content for content in files.values())
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["arguments"] == recipe  # one's own stays
    assert_same(cvit, timm.create_model("hf-hub:me/cvit", pretrained=True).eval())
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(CollapseError, match="folder: .*recipe.json is damaged"):
        push(tmp_path / "run", "me/cvit")


def test_a_pushed_orderer_keeps_its_settings(cvit, hub, tmp_path):
    push(save_orderer(cvit.orderer, tmp_path), "me/orderer")
    assert CollapseOrder.from_pretrained("me/orderer").ranking == "coverage"


def test_a_model_of_ones_own_has_no_results_of_others(cvit, tmp_path):
    config = read_config(CONFIGS["cvit_tiny_patch4_32"])
    assert config.results and config.datasets
    for dataset, named in (("digits", False), ("some/where/cifar10", True)):
        save_model(cvit, tmp_path / "run", recipe={"dataset": dataset}, validation_top1={"1.0": 91.0})
        card = (publish_folder(config, tmp_path / "out", "me/cvit", tmp_path / "run") / "README.md").read_text()
        assert ("uoft-cs/cifar10" in card, "CIFAR-10" in card) == (named, named)
        assert "91.0%" in card and "| collapse, features |" not in card and ("digits" in card) is not named
    whole = publish_folder(config, tmp_path / "own", "me/cvit") / "README.md"
    assert "| collapse, features |" in whole.read_text()


def test_publishing_goes_on_after_an_interruption_and_in_the_folder_of_the_checkpoint(cvit, tmp_path, monkeypatch):
    from timm_collapse.hub import publish

    config = read_config(CONFIGS["cvit_tiny_patch4_32"])
    save_model(cvit, tmp_path / "run", recipe={"lr": 0.5})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "write_card", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        publish_folder(config, tmp_path / "out", "me/cvit", tmp_path / "run")
    out = publish_folder(config, tmp_path / "out", "me/cvit", tmp_path / "run")
    assert json.loads((out / "recipe.json").read_text())["arguments"] == {"lr": 0.5}
    publish_folder(config, out, "me/cvit", out)
    assert json.loads((out / "recipe.json").read_text())["arguments"] == {"lr": 0.5}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    with pytest.raises(CollapseError, match="holds other files"):
        publish_folder(config, tmp_path / "mine", "me/cvit", tmp_path / "run")


def test_files_that_a_model_no_longer_has_leave_the_repository(cvit, hub, tmp_path):
    out = published(cvit, hub, tmp_path)
    assert "orderer/config.json" in hub.repos["me/cvit"].files()
    push(publish_folder(read_config(CONFIGS["collapse_ranker_tiny"]), out, "me/cvit"), "me/cvit")
    assert set(hub.repos["me/cvit"].files()) - {".gitattributes"} == {path.name for path in out.iterdir()}


def test_a_generator_whose_vae_is_a_file_is_refused(tmp_path):
    vae = tmp_path / "vae.safetensors"
    save_file({"x": torch.zeros(1)}, vae)
    model = timm.create_model("cmar_mini_patch1_8", encoder_depth=1, decoder_depth=1)
    model.vae = str(vae)
    save_model(model, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model_args"]["vae"] = str(vae)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CollapseError, match="vae: must be 'pixels' or a Hub id"):
        publish_folder(read_config(CONFIGS["cmar_mini_patch1_8"]), tmp_path / "out", "me/mar", tmp_path / "run")
    with pytest.raises(CollapseError, match="vae: must be 'pixels' or a Hub id"):
        push(tmp_path / "run", "me/mar")


def test_no_file_of_another_model_or_of_the_training_is_sent(cvit, hub, tmp_path):
    out = published(cvit, hub, tmp_path)
    assert (out / "orderer").is_dir()
    ranker = read_config(CONFIGS["collapse_ranker_tiny"])
    publish_folder(ranker, out, "me/ranker")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "recipe.json", "README.md", "order.png"
    }  # fmt: skip
    (out / "checkpoint.pt").write_bytes(b"optimizer")
    push(out, "me/ranker")
    assert "checkpoint.pt" not in hub.repos["me/ranker"].files()
    with pytest.raises(CollapseError, match="holds other files"):
        publish_folder(ranker, out, "me/ranker")
    with pytest.raises(CollapseError, match="holds other files"):
        publish_folder(ranker, tmp_path / "run", "me/ranker")  # the folder of a run
