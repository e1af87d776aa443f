"""`timm-collapse evaluate`: what it writes and prints, and that every failure is one line and an exit code."""

import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_collapse import collapse
from timm_collapse.cli import evaluate as evaluate_cli
from timm_collapse.cli import main as cli
from timm_collapse.collapse.remainder import REMAINDERS
from timm_collapse.data import open_dataset
from timm_collapse.hub.save import save_model

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
QUICK = ["--dataset", "digits", "--workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    model.model_args = SHAPE
    return save_model(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(here, capsys):
    """Runs the command in an empty folder; returns the exit code, stdout and stderr."""

    def run(*argv):
        models = list(itertools.takewhile(lambda each: not str(each).startswith("--"), argv))
        argv = ["--model", *models, *argv[len(models) :]]
        try:
            code = cli.main(["evaluate", *(str(argument) for argument in argv)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_a_local_model_with_three_orderers(run, folder):
    code, out, err = run(
        folder, "--orderer", "random", "bayer", "none", *QUICK, "--images", 50, "--keep", 0.5, 1, 0.22, 0.1,
        "--speed-batch", 2, "--runs", 1, "--json", "a.json", "--markdown", "a.md", "--output", "a.svg",
    )  # fmt: skip
    assert code == 0 and "Traceback" not in err and "picture: a.svg" in out and "50 images of digits" in out
    assert out.count("random") == out.count("bayer") == 2 and Path("a.svg").exists()
    data = json.loads(Path("a.json").read_text())
    random, bayer, none = data["curves"]
    assert [c["orderer"] for c in data["curves"]] == ["random", "bayer", "none"] and data["images"] == 50
    assert random["keeps"] == [1.0, 0.5, 0.22, 0.1] and none["keeps"] == [1.0]
    assert random["hits1"][0] == bayer["hits1"][0] == none["hits1"][0]
    assert bayer["macs"] == sorted(bayer["macs"], reverse=True) and len(bayer["images_per_second"]) == 4
    assert none["auc"] is None and 0 <= bayer["auc"] <= 100 and bayer["masked"] == [0, 0.9]
    text = Path("a.md").read_text()
    assert "| 100% | 50% | 22% | 10% | AuC | knee |" in text and text.count("| bayer |") == 1 + 4
    assert str(folder) not in text + json.dumps(data) and "/".join(folder.parts[-2:]) in text


def test_a_collapsed_model_keeps_its_own_orderer_and_remainder(run, folder, monkeypatch):
    def load(name, args, info):
        return collapse(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), "halton", 0.4, "coarse")

    monkeypatch.setattr(evaluate_cli, "load_model", load)
    code, out, _ = run("any", *QUICK, "--images", 20, "--speed-batch", 0, "--json", "-")
    data = json.loads(out)
    (curve,) = data["curves"]
    assert code == 0 and (curve["orderer"], curve["remainder"]) == ("halton", "coarse") and "macs" not in curve
    assert len(curve["keeps"]) == 14 and curve["masked"] == [0, 0.99]
    code, out, _ = run("any", *QUICK, "--images", 20, "--speed-batch", 0, "--remainder", "fused", "--keep", 0.5,
                       "--orderer", "raster", "none", "--json", "-")  # fmt: skip
    first, second = json.loads(out)["curves"]
    assert (first["orderer"], first["remainder"], first["keeps"]) == ("raster", "fused", [0.5])
    assert (second["orderer"], second["keeps"]) == ("none", [1.0])


def test_every_remainder(run, folder):
    assert evaluate_cli.REMAINDERS == REMAINDERS
    for remainder in REMAINDERS:
        code, out, err = run(f"local-dir:{folder}", *QUICK, "--images", 20, "--speed-batch", 0, "--orderer", "bayer",
                             "--remainder", remainder, "--keep", 1, 0.5, "--json", "-")  # fmt: skip
        assert code == 0, err
        (curve,) = json.loads(out)["curves"]
        model = collapse(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), "bayer", 0.5, remainder)
        dataset = open_dataset("digits", "validation").dataset
        config = timm.data.resolve_model_data_config(model, {"input_size": (3, 32, 32)})
        transform = timm.data.create_transform(**config)
        chosen = [dataset[number * len(dataset) // 20] for number in range(20)]
        found = model(torch.stack([transform(image) for image, _ in chosen])).argmax(1)
        hits = int((found == torch.tensor([label for _, label in chosen])).sum())
        assert (curve["remainder"], curve["keeps"], curve["hits1"][1]) == (remainder, [1.0, 0.5], hits)


def test_random_weights_take_the_classes_of_the_data_set_and_the_seed(run):
    arguments = ["vit_tiny_patch16_224", "--no-pretrained", "--img-size", 32, *QUICK, "--images", 20, "--keep", 1, 0.5]
    found = [
        json.loads(run(*arguments, "--orderer", "random", "--speed-batch", 0, "--seed", seed, "--json", "-")[1])
        for seed in (1, 1)
    ]
    assert found[0] == found[1] and found[0]["curves"][0]["keeps"] == [1.0, 0.5] and not found[0]["pretrained"]


def test_models_of_different_sizes_are_evaluated_one_group_after_another(run, folder, tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "img_size": 16, "depth": 1})
    other.model_args = {**SHAPE, "img_size": 16, "depth": 1}
    save_model(other, tmp_path / "other")
    common = [*QUICK, "--orderer", "random", "--images", 20, "--keep", 0.5, "--speed-batch", 0, "--json", "-"]
    both = json.loads(run(folder, tmp_path / "other", *common)[1])["curves"]
    alone = json.loads(run(tmp_path / "other", *common)[1])["curves"]
    assert len(both) == 2 and both[1] == alone[0]  # whatever else is evaluated


def test_towers_for_images_of_any_size_take_the_size_that_is_asked_for(run, tmp_path, monkeypatch):
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10, "patch_size": 8}
    towers = {
        "qwen3_vit_88m_merge": {"pos_embed_grid_size": 4},
        "deepseek_vit_412m_align": {"out_features": 24},
        "gemma4_vit_167m": {"head_dim": 16, "intermediate_size": 48, "position_embedding_size": 16},
    }
    for name, more in towers.items():
        model = timm.create_model(name, **shape, **more)
        model.model_args = {**shape, **more}
        save_model(model, tmp_path / name)
    sizes, transform = [], evaluate_cli._transform
    monkeypatch.setattr(evaluate_cli, "_transform", lambda c: sizes.append(c["input_size"]) or transform(c))
    common = ["--orderer", "bayer", *QUICK, "--images", 4, "--keep", 1, 0.5, "--speed-batch", 2, "--runs", 1]
    for size in (48, 96):
        code, out, _ = run(*(tmp_path / name for name in towers), "--img-size", size, *common, "--json", "-")
        curves = json.loads(out)["curves"]
        assert code == 0 and len(curves) == 3 and set(sizes) == {(3, size, size)}
        assert all(curve["macs"][1] < 0.6 * curve["macs"][0] for curve in curves)
        sizes.clear()


def test_an_image_folder(run, folder, tmp_path):
    for label in range(10):
        (tmp_path / "set" / "val" / str(label)).mkdir(parents=True)
        Image.new("RGB", (40, 50), (25 * label, 0, 0)).save(tmp_path / "set" / "val" / str(label) / "a.png")
    code, out, _ = run(folder, "--dataset", tmp_path / "set", "--workers", 0, "--orderer", "bayer", "--keep", 0.5,
                       "--speed-batch", 0)  # fmt: skip
    assert code == 0 and "10 images" in out and Path("accuracy.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", "0"], "keep must be a ratio in (0, 1]"),
        (["--keep", "nan"], "keep must be a ratio"),
        (["--keep", "64"], "keeps must be ratios in (0, 1], got 64"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--images", "-1"], "--images must be at least 0"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--output", "a.jpg"], "--output must end in .png, .pdf, .svg"),
        (["--json", "none/a.json"], "the folder 'none' does not exist"),
        (["--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--split", "third"], "split: digits has train and validation"),
        (["--dataset", "nonsense"], "neither 'digits', a folder"),
        (["--orderer", "nonsense"], "'nonsense' is neither"),
        (["--img-size", "0"], "--img-size must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(run, folder, arguments, message):
    code, out, err = run(folder, *QUICK, *arguments)
    assert (code, out) == (2, "") and message in err
    assert err.startswith("timm-collapse: error: ") and err.count("\n") == 1 and not list(Path().iterdir())


@pytest.mark.parametrize(
    "name, message",
    [
        ("nonsense", "'nonsense' could not be loaded"),
        ("resnet18 --no-pretrained", "cannot be collapsed"),
        ("vit_tiny_patch16_224", "could not be loaded"),  # no net: no weights
        ("collapse_ranker_tiny", "is no classifier"),
        (".", "could not be loaded"),
    ],
)
def test_wrong_models_are_one_line_and_exit_code_2(run, name, message):
    code, out, err = run(*name.split(), *QUICK)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_classes_must_be_those_of_the_data_set(run, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "num_classes": 7})
    model.model_args = {**SHAPE, "num_classes": 7}
    save_model(model, tmp_path / "seven")
    code, _, err = run(tmp_path / "seven", *QUICK)
    assert code == 2 and "has 10 classes" in err and "has 7: both must be the same" in err and err.count("\n") == 1


def test_help_has_the_papers_table():
    assert "Table 5" in evaluate_cli.EXAMPLE and "vit_base_patch16_224.augreg2_in21k_ft_in1k" in evaluate_cli.EXAMPLE
