"""The command line: what it writes and prints, and that every failure is one line and an exit code."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_collapse
from timm_collapse import CollapseOrder
from timm_collapse.cli import main as cli
from timm_collapse.data.images import load_photo, photo_tensor


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).resize((120, 80)).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder; returns the exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*argv):
        try:
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_order_writes_the_picture_and_prints_the_first_patches(run, photo):
    code, out, err = run("order", photo, "--orderer", "raster", "--grid", 4, 6, "--keep", 0.5)
    assert (code, err) == (0, "")
    assert "(0, 0) (0, 1) (0, 2)" in out and "kept 12 of 24 patches; picture: order.png" in out
    assert Path("order.png").read_bytes().startswith(b"\x89PNG")


def test_order_of_several_images_is_one_picture(run, photo):
    code, out, _ = run("order", photo, photo, "--orderer", "halton", "--output", "both.svg", "--json", "both.json")
    written = json.loads(Path("both.json").read_text())
    assert code == 0 and Path("both.svg").exists() and "kept 43 of 196" in out
    assert (written["orderer"], written["grid"], written["kept"]) == ("halton", [14, 14], 43)
    assert [each["image"] for each in written["images"]] == [photo, photo]
    assert all(sorted(each["ranks"]) == list(range(196)) for each in written["images"])


def test_json_on_stdout_is_alone_there_and_equals_python(run, photo):
    code, out, err = run("order", photo, "--orderer", "variance", "--grid", 5, 7, "--json", "-")
    assert code == 0 and "first patches" in err
    pixels = photo_tensor(load_photo(photo), (80, 112))[None]
    expected = CollapseOrder.baseline("variance")(pixels * 2 - 1, (5, 7))
    assert json.loads(out)["images"][0]["ranks"] == expected.ranks[0].tolist()


def test_the_seed_decides_a_random_order(run, photo):
    ranks = [json.loads(run("order", photo, "--orderer", "random", "--seed", seed, "--json", "-")[1]) for seed in "112"]
    assert ranks[0] == ranks[1] != ranks[2]


@pytest.mark.parametrize("keep, kept", [("1.0", 24), ("1", 24), ("0.01", 1), ("5", 5), ("0.25", 6)])
def test_keep_means_what_it_means_in_python(run, photo, keep, kept):
    code, out, _ = run("order", photo, "--orderer", "halton", "--grid", 4, 6, "--keep", keep)
    assert code == 0 and f"kept {kept} of 24" in out


@pytest.mark.parametrize("source", ["", "local-dir:"])
def test_a_saved_model_orders_photos(run, photo, tmp_path, source):
    import timm

    from timm_collapse.hub.save import save_model

    shape = {"img_size": 32, "patch_size": 8, "dim": 32, "depth": 1, "rank": 4}
    model = timm.create_model("collapse_ranker_tiny", **shape)
    save_model(model, tmp_path / "ranker")
    code, out, _ = run("order", photo, "--orderer", f"{source}{tmp_path / 'ranker'}", "--json", "-")
    orderer = CollapseOrder(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (orderer.mean, orderer.std))
    expected = orderer(((photo_tensor(load_photo(photo), 224) - mean) / std)[None], (14, 14))
    assert code == 0 and json.loads(out)["images"][0]["ranks"] == expected.ranks[0].tolist()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", "few"], "keep must be a number"),
        (["--keep", "0"], "keep must be"),
        (["--keep", "0.0"], "keep must be"),
        (["--keep", "1.5"], "keep must be"),
        (["--keep", "-0.5"], "keep must be"),
        (["--keep", "nan"], "keep must be"),
        (["--keep", "197"], "keep must be"),
        (["--grid", "0", "14"], "grid must be"),
        (["--grid", "14", "129"], "at most 128"),
        (["--grid", "100", "100"], "too small for a grid"),
        (["--orderer", "nonsense"], "nonsense"),
        (["--ranking", "best"], "--ranking must be one of"),
        (["--ranking", "coverage"], "--ranking is for a CoMAE"),
        (["--output", "a.jpg"], "--output must end in .png, .pdf, .svg"),
        (["--output", "none/a.png"], "does not exist"),
        (["--json", "none/a.json"], "--json: the folder 'none' does not exist"),
        (["missing.jpg"], "missing.jpg"),
        (["."], "cannot read"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(run, photo, arguments, message):
    code, out, err = run("order", photo, "--orderer", "halton", *arguments) if arguments[0].startswith("-") else run(
        "order", *arguments, "--orderer", "halton"
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err.startswith("timm-collapse: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["order"], ["order", "a.jpg", "--seed", "-1"]],
)
def test_arguments_that_do_not_parse_exit_with_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2 and "usage: timm-collapse" in err and "error:" in err


def test_bad_photos_are_named(run, photo, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "tiny.png")
    (tmp_path / "cut.jpg").write_bytes(Path(photo).read_bytes()[:900])
    for name, message in {"tiny.png": "1 x 1 pixels, too small", "cut.jpg": "damaged or truncated"}.items():
        code, out, err = run("order", photo, tmp_path / name, "--orderer", "halton")
        assert (code, out) == (2, "") and name in err and message in err and err.count("\n") == 1
    assert not list(Path().iterdir())  # nothing was written


def test_odd_file_names_are_printed(run, photo, tmp_path):
    for name in ("[bold]$x_1$.jpg", "caf\udce9.jpg"):  # markup, and bytes that are no UTF-8
        (tmp_path / name).write_bytes(Path(photo).read_bytes())
        code, out, err = run("order", tmp_path / name, "--orderer", "halton", "--output", "[red]a.png")
        assert (code, err) == (0, "") and "picture: [red]a.png" in out
    assert "udce9" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"example:\n  timm-collapse {command}" in out
    assert command in run("--help")[1]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_the_same_words(command):
    """The result is --output, the orderer --orderer, the ViT or generator --model; nothing has two spellings."""
    parser = argparse.ArgumentParser()
    cli.COMMANDS[command].declare(parser)
    options = [option for action in parser._actions for option in action.option_strings]
    assert not {"--out", "--models", "--orderers", "--keeps", "--checkpoint-dir"} & set(options)
    assert not [option for option in options if "_" in option] and len(options) == len(set(options))
    assert command == "evaluate-generation" or "--output" in options  # which prints its result
    for name in ("SUMMARY", "DESCRIPTION", "EXAMPLE"):
        assert isinstance(getattr(cli.COMMANDS[command], name), str)


def test_underscores_are_dashes_as_in_the_train_scripts():
    words = ["order-dataset", "--dataset", "a_b", "--output", "c_d", "--batch_size", "3", "--shard_size=7"]
    args = cli.build_parser().parse_args([*words, "--no_mirror"])
    assert (args.batch_size, args.shard_size, args.mirror) == (3, 7, False)
    assert (args.dataset, args.output) == ("a_b", "c_d")
    args = cli.build_parser().parse_args(["order", "--keep", "2", "--", "--my_photo.jpg"])
    assert args.images == ["--my_photo.jpg"]


def test_version(run):
    assert run("--version")[:2] == (0, f"timm-collapse {timm_collapse.__version__}\n")


def test_quickstart_gets_its_arguments(run, monkeypatch):
    calls = []
    module = type(sys)("timm_collapse.quickstart")
    module.quickstart = lambda *args: calls.append(args)
    monkeypatch.setitem(sys.modules, "timm_collapse.quickstart", module)
    assert run("quickstart")[0] == run("quickstart", "--output", "x", "--seed", "3")[0] == 0
    assert calls == [("runs/quickstart", 0), ("x", 3)]


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (PermissionError(13, "denied", "x"), 2)])
def test_interrupts_and_system_errors_are_exit_codes(run, monkeypatch, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(cli.COMMANDS["quickstart"], "run", fail)
    result, _, err = run("quickstart")
    assert result == code and "Traceback" not in err


def test_help_imports_nothing_heavy():
    package = str(Path(cli.__file__).parents[1])
    program = f"""
import sys, types
package = types.ModuleType("timm_collapse")  # the command line alone, without the package's own imports
package.__path__, package.__version__ = [{package!r}], "0"
sys.modules["timm_collapse"] = package
from timm_collapse.cli import main as cli
try:
    cli.main(["order", "--help"])
except SystemExit:
    pass
print([name for name in ("torch", "timm", "numpy", "matplotlib", "PIL", "rich") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
