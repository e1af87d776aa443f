"""`timm-collapse latents`: what it writes and prints, and that every failure is one line and an exit code."""

from types import SimpleNamespace

import pytest
import torch

from timm_collapse.cli import latents
from timm_collapse.cli.main import build_parser
from timm_collapse.data import LatentCache, open_dataset
from timm_collapse.engine.latents import data_set_latents
from timm_collapse.models import PixelCodec, load_codec
from timm_collapse.order import CollapseError


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys):
    """Runs the command on every eighth validation digit; returns stdout and stderr."""

    def run(*argv):
        common = ["--dataset", "digits", "--split", "validation", "--part", "1/8", "--workers", 0, "--device", "cpu"]
        latents.run(build_parser().parse_args(["latents", *(str(argument) for argument in (*common, *argv))]))
        return capsys.readouterr()

    return run


def test_digits_through_a_vae_from_a_folder(run, vae, tmp_path):
    arguments = ("--vae", vae, "--img-size", 8, "--output", tmp_path / "a", "--shard-size", 20, "--batch-size", 16)
    out, err = run(*arguments)
    assert f"latents of 45 images, 4 x 4 x 4 each, 10 classes: {tmp_path / 'a'}" in out and "45/45" in err
    cache, codec = LatentCache(tmp_path / "a", load_codec(vae)), load_codec(vae)
    dataset = open_dataset("digits", "validation", "1/8").dataset
    assert cache.labels.tolist() == [label for _, label in dataset] and cache.source == "digits validation 1/8"
    assert len(list((tmp_path / "a").iterdir())) == 3
    pixels = torch.tensor(list(dataset[44][0].tobytes())).view(1, 8, 8, 3).permute(0, 3, 1, 2) / 255
    expected, _ = codec.moments(pixels)
    record, _ = cache[44]
    assert torch.allclose(record[0, 0].float(), expected[0], atol=2e-3)
    with pytest.raises(CollapseError, match="codec: .*choose another folder"):
        run(*arguments, "--scale", 2)


def test_measured_scale_gives_unit_variance(run, vae, tmp_path):
    options = ("--vae", vae, "--img-size", 8, "--batch-size", 7)
    out, _ = run(*options, "--measure-scale", 0)
    assert "(two halves of 45 images)" in out and not list(tmp_path.iterdir())
    scale = float(out.split("--scale")[1])
    run(*options, "--scale", scale, "--output", tmp_path)
    cache = LatentCache(tmp_path)
    records = torch.stack([record for record, _ in cache])
    drawn = cache.latents(records, torch.zeros(45, dtype=torch.bool), torch.randn(45, *cache.latent_shape))
    assert abs(float(drawn.std()) - 1) < 0.03
    out, _ = run(*options, "--measure-scale", 9, "--scale", scale)
    assert "two halves of 9 images" in out


def test_pixels(run, tmp_path):
    out, _ = run("--vae", "pixels", "--img-size", 12, "--output", tmp_path)
    assert "45 images, 3 x 12 x 12 each" in out and LatentCache(tmp_path)[0][0].dtype == torch.uint8


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--vae", "pixels"], "--output must name the folder"),
        (["--vae", "pixels", "--output", "x", "--shard-size", 0], "--shard-size must be at least 1, got 0"),
        (["--vae", "nothing", "--output", "x"], "'nothing' is neither a local folder"),
        (["--vae", "pixels", "--scale", 1, "--output", "x"], "scale: is for a VAE"),
        (["--vae", "pixels", "--device", "nowhere", "--output", "x"], "--device: 'nowhere' cannot be used"),
    ],
)
def test_failures_are_explained(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CollapseError, match=message):
        run("--img-size", 8, *argv)
    assert not list(tmp_path.iterdir())


def test_training_takes_what_the_command_wrote_and_the_other_way_round(run, tmp_path, monkeypatch):
    """One function says what latents are of; neither the number of images a file nor the classes matter."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder, own = tmp_path / "latents", tmp_path / "own"
    run("--vae", "pixels", "--img-size", 8, "--output", folder, "--shard-size", 20)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    args = SimpleNamespace(dataset="digits", split="validation", part="1/8", device="cpu", workers=0)
    dataset, num_classes = open_dataset(args.dataset, args.split, args.part)
    cache = data_set_latents(args, folder, dataset, PixelCodec(), 8, num_classes)
    assert len(cache) == 45 and cache.num_classes == 10
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before
    with pytest.raises(
        CollapseError, match="source: .*'digits validation 1/8', needed are those of 'digits train 1/8'"
    ):
        data_set_latents(SimpleNamespace(**{**vars(args), "split": "train"}), folder, dataset, PixelCodec(), 8, 10)

    data_set_latents(args, own, dataset, PixelCodec(), 8, num_classes)
    out, _ = run("--vae", "pixels", "--img-size", 8, "--output", own)
    assert "latents of 45 images" in out and len(list(own.iterdir())) == 1
