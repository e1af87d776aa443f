"""`timm-collapse generate`: the images that it writes are those of MAR.generate, and every failure is one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_collapse import ClassOrderBank, CollapseOrder, Order
from timm_collapse.cli import main as cli
from timm_collapse.evaluation.samples import open_samples
from timm_collapse.hub.files import BANK_FILE
from timm_collapse.hub.mar_checkpoints import load_mar
from timm_collapse.hub.save import save_model
from timm_collapse.models import MAR, PixelCodec
from timm_collapse.models.draft import draft_order
from timm_collapse.order import GENERATION_ORDERS, tokens_per_step
from timm_collapse.plots import Film

CLASSES = 3


def tiny(**arguments):
    """A MAR of 16 tokens of 2 x 2 pixels. Nothing is learnt, but all that it is given matters."""
    shape = dict(encoder_embed_dim=24, encoder_depth=1, decoder_embed_dim=24, decoder_depth=1)
    head = dict(diffloss_d=1, diffloss_w=24, num_sampling_steps=3)
    torch.manual_seed(0)
    model = timm.create_model("mar_mini_patch1_8", patch_size=2, **shape, **head, **arguments)
    for parameter in model.parameters():  # else the head starts at zero, and its conditions would not matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, one without classes, and banks of three classes and of one."""
    root = tmp_path_factory.mktemp("models")
    save_model(tiny(num_classes=CLASSES), root / "mar")
    save_model(tiny(num_classes=0), root / "free")
    order = Order(torch.rand(30, 16), (4, 4))
    ClassOrderBank.build([(order, torch.arange(30) % CLASSES)], CLASSES).save(root / "bank.safetensors")
    ClassOrderBank.build([(order, None)], 1).save(root / "one.safetensors")
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).save(root / "photo.png")
    return root


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns the exit code, stdout, stderr, and the images of --samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*argv, model="mar"):
        arguments = [str(argument) for argument in argv]
        samples = [] if "--samples" in arguments else ["--samples", "images.npz"]
        try:
            code = cli.main(["generate", "--model", str(folder / model), "--device", "cpu", *arguments, *samples])
        except SystemExit as error:
            code = error.code
        images = np.load("images.npz")["arr_0"] if not code and samples else None
        return code, *capsys.readouterr(), images

    return run


def pixels(latents):
    return (PixelCodec().decode(latents) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_images_are_those_of_python(run, folder):
    options = ["--steps", 5, "--guidance-scale", 2, "--guidance-schedule", "constant", "--temperature", 0.9,
               "--diffusion-steps", 3, 2, "--seed", 7]  # fmt: skip
    code, out, err, images = run("--labels", 2, 0, 2, "--per-label", 2, *options)
    assert code == 0 and "error" not in err
    mar = timm.create_model(f"local-dir:{folder / 'mar'}", pretrained=True)
    expected = mar.generate([2, 2, 0, 0, 2, 2], 5, 2.0, "constant", 0.9, diffusion_steps=(3, 2),
                            generator=torch.Generator().manual_seed(7))  # fmt: skip
    np.testing.assert_array_equal(images, pixels(expected))
    assert "6 images, 5 steps, order random" in out and "images/s" in out and "grid: samples.png" in out
    assert Path("samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_seed_and_the_labels_decide_the_images(run):
    quick = ["--steps", 4, "--diffusion-steps", 2]
    a, b, c, d = (run("--labels", label, *quick, "--seed", seed)[3] for label, seed in ((1, 3), (1, 3), (1, 4), (2, 3)))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() and (a != d).any()


def test_all_labels_in_batches_as_files_and_for_evaluation(run):
    options = ["--labels", "all", "--per-label", 2, "--batch-size", 4]
    images = run(*options)[3]
    code, out, _, _ = run(*options, "--samples", "new/files")
    assert code == 0 and "6 images, 16 steps" in out and "samples: new/files" in out
    names = sorted(path.name for path in Path("new/files").iterdir())
    assert names == [f"{number:06d}_{number // 2}.png" for number in range(6)]
    for name, image in zip(names, images):
        np.testing.assert_array_equal(np.asarray(Image.open(Path("new/files") / name)), image)
    samples = open_samples("images.npz")
    assert samples.classes({}).tolist() == [0, 0, 1, 1, 2, 2] and samples.size == (8, 8)
    assert len(open_samples("new/files")) == 6


def test_a_model_without_classes(run):
    code, _, _, images = run("--per-label", 3, "--diffusion-steps", 2, model="free")
    assert code == 0 and images.shape == (3, 8, 8, 3)
    assert run("--per-label", 3, "--samples", "files", model="free")[0] == 0 and Path("files/000002.png").exists()
    assert open_samples("images.npz").classes({}) is None  # nothing was asked for


def test_precision_is_that_of_the_networks_not_of_the_codec(run, monkeypatch):
    seen = []

    def spy(cls, name):
        function = getattr(cls, name)

        def wrapped(*args, **kwargs):
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return function(*args, **kwargs)

        monkeypatch.setattr(cls, name, wrapped)

    spy(MAR, "generate")
    spy(PixelCodec, "decode")
    quick = ["--labels", 0, 1, "--steps", 2, "--diffusion-steps", 2]
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert run(*quick, "--precision", precision)[0] == 0
        assert seen == [dtype, torch.float32]
        seen.clear()


def test_orders_of_a_bank(run, folder):
    quick = ["--labels", 1, "--steps", 4, "--diffusion-steps", 2]
    bank = ["--bank", folder / "bank.safetensors"]
    mar = timm.create_model(f"local-dir:{folder / 'mar'}", pretrained=True).load_bank(bank[1])
    expected = mar.generate([1], 4, diffusion_steps=2, order="collapse", generator=torch.Generator().manual_seed(0))
    code, out, _, images = run(*quick, *bank)
    assert code == 0 and "order collapse," in out
    np.testing.assert_array_equal(images, pixels(expected))
    backwards = run(*quick, *bank, "--order", "collapse_reversed")[3]
    assert (backwards != pixels(expected)).any()


def test_the_bank_beside_the_weights_is_the_default(run, folder):
    shutil.copytree(folder / "mar", "own")
    shutil.copy(folder / "bank.safetensors", Path("own", BANK_FILE))
    quick = ["--labels", 1, "--steps", 4, "--diffusion-steps", 2]
    code, out, _, images = run(*quick, model=Path("own").resolve())
    assert code == 0 and "order collapse," in out
    np.testing.assert_array_equal(images, run(*quick, "--bank", folder / "bank.safetensors")[3])


def test_a_draft_gives_the_order(run, folder):
    options = ["--labels", 0, 2, "--steps", 4, "--diffusion-steps", 2, "--draft", 3, "--orderer", "variance"]
    code, out, _, images = run(*options)
    mar = timm.create_model(f"local-dir:{folder / 'mar'}", pretrained=True)
    generator, labels = torch.Generator().manual_seed(0), torch.tensor([0, 2])
    order = draft_order(mar, PixelCodec(), CollapseOrder.baseline("variance"), labels, 3, generator=generator)
    expected = mar.generate(labels, 4, diffusion_steps=2, order=order, generator=generator)
    assert code == 0 and "order draft" in out
    np.testing.assert_array_equal(images, pixels(expected))


def test_an_edit_keeps_all_other_tokens(run, folder):
    photo = np.asarray(Image.open(folder / "photo.png"))
    edit = ["--image", folder / "photo.png", "--labels", 0, 1, "--diffusion-steps", 2]
    code, out, _, images = run(*edit, "--regenerate", 3, 2, 4, 5, "--regenerate", 6, 6, 8, 8, "--film", "film.png")
    assert code == 0 and "2 images, 3 steps" in out and Path("film.png").exists()  # as many steps as tokens
    changed = np.zeros((8, 8), dtype=bool)
    changed[2:4, 2:6] = changed[6:, 6:] = True  # whole tokens: 2 that the first box touches, and the last
    for image in images:
        np.testing.assert_array_equal(image[~changed], photo[~changed])
        assert (image != photo).any(2)[changed].mean() > 0.5
    assert (images[0] != images[1]).any()
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[3, 2:5] = mask[6:, 6:] = 255
    Image.fromarray(mask).save("mask.png")
    np.testing.assert_array_equal(run(*edit, "--regenerate", "mask.png", "--film", "film.png")[3], images)
    drafted = run(*edit, "--regenerate", "mask.png", "--draft", 2, "--orderer", "variance")[3]
    np.testing.assert_array_equal(drafted[:, ~changed], np.stack([photo[~changed]] * 2))


def test_the_grid_of_an_edit_begins_with_the_photo(run, folder, monkeypatch):
    from timm_collapse import plots

    calls, draw = [], plots.plot_samples
    monkeypatch.setattr(plots, "plot_samples", lambda *given: calls.append(given) or draw(*given))
    box = ["--image", folder / "photo.png", "--regenerate", 0, 0, 2, 2, "--diffusion-steps", 2]
    assert run(*box, "--labels", 2)[0] == run(*box, model="free")[0] == 0
    (images, names), (_, free) = calls
    assert names == ["photo", "photo", "class 2"] and free == ["photo", "photo", "new"]
    photo = torch.from_numpy(np.array(Image.open(folder / "photo.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0], photo)
    assert images[1][:, :2, :2].std() == 0 and torch.equal(images[1][:, 2:], images[0][:, 2:])
    torch.testing.assert_close(images[2][:, 2:], photo[:, 2:])


def test_the_film_begins_with_the_tokens_of_the_plan(run, monkeypatch):
    films, plot = [], Film.plot
    monkeypatch.setattr(Film, "plot", lambda self, codec: films.append(self) or plot(self, codec))
    options = ["--labels", "all", "--per-label", 2, "--batch-size", 5, "--diffusion-steps", 2, "--steps", 10]
    assert run(*options, "--order", "raster", "--film", "film.pdf")[0] == 0 and Path("film.pdf").exists()
    film, plan = films[0], tokens_per_step(16, 10)
    assert len(film.known) == 8 and film.known[0].sum(1).tolist() == [plan[0]] * 4 and film.known[-1].all()
    expected = torch.arange(10).repeat_interleave(torch.tensor(plan))
    assert torch.equal(film.iterations, expected.expand(4, -1))


class Codec(torch.nn.Module):
    """Stands for a VAE: 12 channels, 16 pixels a position."""

    channels, stride = 12, 16

    def decode(self, latents):
        return latents[:, :3].sigmoid().repeat_interleave(16, 2).repeat_interleave(16, 3)


def test_a_checkpoint_file(run, folder, tmp_path, monkeypatch):
    state = load_file(folder / "mar" / "model.safetensors")
    torch.save({"model": {}, "model_ema": state}, tmp_path / "mar.pth")
    options = ["--labels", 0, "--diffusion-steps", 2]
    code, out, err, _ = run(*options, "--vae", "pixels", model=tmp_path / "mar.pth")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "--vae: the model's latents have 12 channels and a stride of 16 pixels, those of 'pixels' 3 and 1" in err
    monkeypatch.setattr(MAR, "codec", lambda mar: Codec())
    code, _, err, images = run(*options, model=tmp_path / "mar.pth")
    assert code == 0, err
    expected = load_mar(tmp_path / "mar.pth").generate(
        [0], 16, diffusion_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert images.shape == (1, 64, 64, 3)
    decoded = (Codec().decode(expected) * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(images, decoded.permute(0, 2, 3, 1).numpy())
    (tmp_path / "bad.pth").write_text("nonsense")
    code, out, err, _ = run("--labels", 0, model=tmp_path / "bad.pth")
    assert code == 2 and err.startswith("timm-collapse: error: --model: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--labels: must be class numbers in [0, 2], or all, got none"),
        (["--labels", "3"], "--labels: must be class numbers in [0, 2], or all, got '3'"),
        (["--labels", "-1"], "got '-1'"),
        (["--labels", "cat"], "got 'cat'"),
        (["--labels", "all", "1"], "got 'all'"),
        (["--labels", "1", "--per-label", "0"], "--per-label must be at least 1"),
        (["--labels", "1", "--steps", "17"], "--steps: must be in [1, 16], as there are 16 tokens to generate, got 17"),
        (["--labels", "1", "--steps", "0"], "--steps: must be in [1, 16]"),
        (["--labels", "1", "--draft", "0"], "--draft: must be in [1, 16]"),
        (["--labels", "1", "--draft", "2", "--order", "raster"], "--order must not be given with --draft"),
        (["--labels", "1", "--draft", "2", "--bank", "x"], "--bank must not be given with --draft"),
        (["--labels", "1", "--draft", "2", "--orderer", "nonsense"], "'nonsense' is neither"),
        (["--labels", "1", "--orderer", "variance"], "--orderer is for --draft"),
        (["--labels", "1", "--order", "nonsense"], "order must be one of random"),
        (["--labels", "1", "--order", "collapse"], "timm-collapse order-bank --grid 4 4"),
        (["--labels", "1", "--order", "raster", "--bank", "BANK"], "--bank is for --order collapse"),
        (["--labels", "1", "--bank", "ONE"], "--bank: must have orders of 3 classes as the model, got 1"),
        (["--labels", "1", "--bank", "PHOTO"], "is no class order bank"),
        (["--labels", "1", "--bank", "missing"], "missing"),
        (["--labels", "1", "--guidance-scale", "nan"], "--guidance-scale must be at least 0 and finite"),
        (["--labels", "1", "--diffusion-steps", "1", "2", "3"], "--diffusion-steps must be one or two numbers"),
        (["--labels", "1", "--diffusion-steps", "1001"], "in [1, 1000], got 1001"),
        (["--labels", "1", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--labels", "1", "--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--labels", "1", "--output", "a.jpg"], "--output must end in .png, .pdf, .svg"),
        (["--labels", "1", "--film", "a.gif"], "--film must end in"),
        (["--labels", "1", "--samples", "none/a.npz"], "--samples: the folder 'none' does not exist"),
        (["--labels", "1", "--samples", "PHOTO"], "--samples must be a folder or a file that ends in .npz"),
        (["--labels", "1", "--samples", "."], "--output must not be in the folder of --samples, got 'samples.png'"),
        (["--labels", "1", "--output", "none/a.png"], "the folder 'none' does not exist"),
        (["--labels", "1", "--regenerate", "a.png"], "must be given together, got only --regenerate"),
        (["--labels", "1", "--image", "PHOTO"], "--image and --regenerate must be given together, got only --im"),
        (["--labels", "1", "--image", "missing.jpg", "--regenerate", "a.png"], "cannot read missing.jpg"),
        (["--labels", "1", "--image", "BANK", "--regenerate", "a.png"], "is not an image"),
        (["--labels", "1", "--image", "PHOTO", "--regenerate", "0", "0", "9", "4"], "got 0 0 9 4"),
        (["--labels", "1", "--image", "PHOTO", "--regenerate", "-1", "0", "2", "4"], "got -1 0 2 4"),
        (["--labels", "1", "--image", "PHOTO", "--regenerate", "2", "2", "2", "4"], "TOP < BOTTOM"),
        (["--labels", "1", "--image", "PHOTO", "--regenerate", "2", "2", "4"], "TOP LEFT BOTTOM RIGHT"),
        (["--labels", "1", "--image", "PHOTO", "--regenerate", "a", "0", "2", "4"], "got a 0 2 4"),
        (["--labels", "1", "--image", "PHOTO", "--regenerate", "0", "0", "2", "4", "--steps", "3"], "in [1, 2]"),
    ],
)
def test_wrong_arguments_are_one_line(run, folder, arguments, message):
    files = {"BANK": folder / "bank.safetensors", "ONE": folder / "one.safetensors", "PHOTO": folder / "photo.png"}
    code, out, err, _ = run(*(files.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and not list(Path().iterdir())
    assert err.startswith("timm-collapse: error: ") and message in err and err.count("\n") == 1


def test_a_folder_of_samples_with_anything_in_it_is_refused(run):
    """evaluate-generation would measure old samples, too."""
    Path("old").mkdir()
    Path("old/000000_1.png").write_bytes(b"")
    code, out, err, _ = run("--labels", 1, "--samples", "old")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "--samples: the folder 'old' is not empty" in err and "empty it, or name another folder" in err
    assert sorted(path.name for path in Path().rglob("*")) == ["000000_1.png", "old"]
    Path("old/000000_1.png").unlink()
    assert run("--labels", 1, "--diffusion-steps", 2, "--samples", "old")[0] == 0
    assert [path.name for path in Path("old").iterdir()] == ["000000_1.png"]


def test_masks_and_boxes_add_up(run, folder):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save("mask.png")
    edit = ["--labels", 0, "--image", folder / "photo.png", "--diffusion-steps", 2]
    code, _, _, images = run(*edit, "--regenerate", "mask.png", "--regenerate", 6, 6, 8, 8)
    np.testing.assert_array_equal(images, run(*edit, "--regenerate", 0, 0, 1, 1, "--regenerate", 7, 7, 8, 8)[3])
    assert code == 0


def test_wrong_masks_and_models(run, folder):
    Image.new("L", (8, 8)).save("black.png")
    Image.new("L", (9, 8), 255).save("large.png")
    edit = ["--labels", 1, "--image", folder / "photo.png", "--regenerate"]
    assert (
        "--regenerate: a mask must have white pixels where to regenerate, black.png has none"
        in run(*edit, "black.png")[2]
    )
    assert "--regenerate: a mask must be as large as the photo, 8 x 8 pixels" in run(*edit, "large.png")[2]
    assert "the model has no classes" in run("--labels", 1, model="free")[2]
    save_model(timm.create_model("cvit_tiny_patch4_32"), "vit")
    for model, message in ((Path("vit").resolve(), "is no generator, but a"), ("missing", "could not be loaded")):
        code, _, err, _ = run("--labels", 1, model=model)
        assert code == 2 and message in err and err.count("\n") == 1


def test_help_names_all_orders(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = capsys.readouterr().out
    assert all(order in out for order in GENERATION_ORDERS)
