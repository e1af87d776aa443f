import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_collapse.data import LatentCache, StepLoader
from timm_collapse.models import PixelCodec, VaeCodec
from timm_collapse.order import CollapseError

SIZE = 8


class Noise(Dataset):
    """Images of different shapes and modes; the label is the index modulo 3."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        pixels = torch.randint(256, (12 + index % 4, 12, 3), generator=torch.Generator().manual_seed(index))
        image = Image.fromarray(pixels.byte().numpy())
        return (image.convert("L") if index == 1 else image), index % 3

    def tensor(self, index):
        """(3, S, S) in [0, 1]: shorter side to S, then the centre."""
        image = self[index][0].convert("RGB")
        width, height = image.size
        short = min(image.size)
        image = image.resize((SIZE * width // short, SIZE * height // short), Image.Resampling.BICUBIC)
        left, top = round((image.width - SIZE) / 2), round((image.height - SIZE) / 2)
        image = image.crop((left, top, left + SIZE, top + SIZE))
        return (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
        )


class Counting(VaeCodec):
    """Counts the images that are encoded; optionally is killed at one."""

    encoded, killed_at = 0, None

    def moments(self, images):
        self.encoded += len(images)
        if self.killed_at is not None and self.encoded > self.killed_at:
            raise KeyboardInterrupt
        return super().moments(images)


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def build(folder, codec, length=10, source="noise train", **kwargs):
    kwargs = {"img_size": SIZE, "shard_size": 4, "batch_size": 3, "quiet": True, **kwargs}
    return LatentCache.build(folder, Noise(length), codec, source=source, **kwargs)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_pixels_are_kept_once_and_mirrored_on_reading(tmp_path):
    codec = PixelCodec(mean=(0.4, 0.5, 0.6))
    cache = build(tmp_path, codec)
    assert len(cache) == 10 and cache.latent_shape == (3, SIZE, SIZE) and cache.source == "noise train"
    assert cache.labels.tolist() == [i % 3 for i in range(10)] and cache.num_classes == 3
    records, index = zip(*(cache[i] for i in (9, 1, 4)))
    assert index == (9, 1, 4) and records[0].dtype == torch.uint8
    images = torch.stack([Noise(10).tensor(i) for i in index])
    mirrored = torch.tensor([False, True, True])
    images[1:] = images[1:].flip(-1)
    expected = codec.moments(images)[0]
    for opened in (cache, LatentCache(tmp_path)):  # without a codec the folder's own mean and std are taken
        assert torch.allclose(opened.latents(torch.stack(records), mirrored), expected, atol=1e-5)
    assert sum(len(blob) for blob in contents(tmp_path).values()) < 10 * 3 * SIZE**2 + 3 * 1000


def test_vae_records_are_moments_of_the_image_and_of_the_encoded_mirror_image(tmp_path, vae):
    codec = VaeCodec(vae)
    cache = build(tmp_path, codec)
    assert cache.latent_shape == (4, 4, 4)
    index, mirrored = [0, 5, 9, 9], torch.tensor([False, True, True, False])
    records = torch.stack([cache[i][0] for i in index])
    assert records.shape == (4, 2, 2, 4, 4, 4) and records.dtype == torch.float16
    images = torch.stack([Noise(10).tensor(i) for i in index])
    views = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    mean, std = codec.moments(views)
    noise = torch.randn(4, 4, 4, 4)
    latents = cache.latents(records, mirrored, noise)
    assert latents.dtype == torch.float32 and torch.allclose(latents, mean + std * noise, atol=5e-3)
    assert torch.allclose(cache.latents(records, mirrored, 0 * noise), mean, atol=2e-3)
    flipped_latents = codec.moments(images)[0].flip(-1)  # convolutions with stride: not the same
    assert not torch.allclose(flipped_latents[1], mean[1], atol=0.02)


@pytest.mark.parametrize("noise", [None, torch.zeros(2, 4, 4, 3)])
def test_a_vae_needs_noise_of_the_right_shape(tmp_path, vae, noise):
    cache = build(tmp_path, VaeCodec(vae), length=2)
    records = torch.stack([cache[0][0], cache[1][0]])
    with pytest.raises(CollapseError, match=r"noise: .*\(2, 4, 4, 4\), got"):
        cache.latents(records, torch.zeros(2, dtype=torch.bool), noise)


def test_a_killed_build_goes_on_where_it_was(tmp_path, vae):
    build(tmp_path / "whole", VaeCodec(vae))
    codec = Counting(vae)
    codec.killed_at = 2 * 6  # in the second file
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", codec)
    (first,) = contents(tmp_path / "killed")
    (tmp_path / "killed" / first.replace("00000", "00001", 1).replace("safetensors", "tmp")).write_bytes(b"half")
    with pytest.raises(CollapseError, match="lacks 2 of 3 files.*latents-00001-of-00003"):
        LatentCache(tmp_path / "killed")
    codec.encoded, codec.killed_at = 0, None
    build(tmp_path / "killed", codec)
    assert codec.encoded == 2 * 6  # images 4 to 9 and their mirror images
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.tmp"))
    build(tmp_path / "killed", codec)
    assert codec.encoded == 2 * 6


def test_a_missing_file_alone_is_encoded_again(tmp_path, vae):
    codec = Counting(vae)
    build(tmp_path, codec)
    before = contents(tmp_path)
    (tmp_path / "latents-00002-of-00003.safetensors").unlink()
    codec.encoded = 0
    build(tmp_path, codec)
    assert codec.encoded == 2 * 2 and contents(tmp_path) == before


def test_two_processes_write_what_one_writes(tmp_path, vae):
    build(tmp_path / "one", VaeCodec(vae))
    codecs = [Counting(vae), Counting(vae)]
    for rank in (1, 0):
        assert build(tmp_path / "two", codecs[rank], rank=rank, world=2) is None
    assert [codec.encoded for codec in codecs] == [2 * 6, 2 * 4]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(LatentCache(tmp_path / "two", codecs[0])) == 10


def test_a_truncated_file_is_refused_and_rebuilt(tmp_path, vae):
    build(tmp_path, VaeCodec(vae))
    before = contents(tmp_path)
    file = tmp_path / "latents-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CollapseError, match="latents-00001-of-00003.safetensors' is damaged"):
        LatentCache(tmp_path)
    build(tmp_path, VaeCodec(vae))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "other,message",
    [
        ({"source": "other train"}, "source: .* holds latents of 'noise train', needed are those of 'other train'"),
        ({"length": 11}, "images: .*10.*11"),
        ({"img_size": 16}, "img_size: .*8.*16"),
        ({"shard_size": 5}, "shard_size: .*4.*5"),
        ({"codec": PixelCodec(mean=(0.1,) * 3)}, "codec: .*0.5.*0.1"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, other, message):
    build(tmp_path, PixelCodec())
    before = contents(tmp_path)
    with pytest.raises(CollapseError, match=message):
        build(tmp_path, **{"codec": PixelCodec(), **other})
    assert contents(tmp_path) == before


def test_opening_refuses_another_codec_mixed_files_and_an_empty_folder(tmp_path, vae):
    with pytest.raises(CollapseError, match="holds no latents"):
        LatentCache(tmp_path)
    build(tmp_path / "a", VaeCodec(vae))
    with pytest.raises(CollapseError, match="codec: .*'scale': 0.5.*'scale': 0.9"):
        LatentCache(tmp_path / "a", VaeCodec(vae, 0.9))
    build(tmp_path / "b", VaeCodec(vae), source="other")
    name = "latents-00001-of-00003.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(CollapseError, match="source: .*'other', needed are those of 'noise train'"):
        LatentCache(tmp_path / "a")


def test_bad_numbers_and_latents_beyond_fp16_are_refused(tmp_path, vae):
    with pytest.raises(CollapseError, match="img_size: must be a multiple of the codec's stride 2, got 7"):
        build(tmp_path, VaeCodec(vae), img_size=7)
    with pytest.raises(CollapseError, match="shard_size: must be at least 1, got 0"):
        build(tmp_path, PixelCodec(), shard_size=0)
    with pytest.raises(CollapseError, match="no images"):
        build(tmp_path, PixelCodec(), length=0)
    with pytest.raises(CollapseError, match="not finite in fp16 with scale 1000000.0"):
        build(tmp_path, VaeCodec(vae, 1e6))


def test_batches_of_the_step_loader(tmp_path, vae):
    codec = VaeCodec(vae)
    build(tmp_path, codec)
    batches = {}
    for workers in (0, 1):
        cache = LatentCache(tmp_path, codec)
        loader = StepLoader(cache, lambda record: record, batch=5, steps=range(2), workers=workers)
        batches[workers] = list(loader)
    assert sorted(torch.cat([index for _, index in batches[0]]).tolist()) == list(range(10))
    for (records, index), (again, same) in zip(batches[0], batches[1]):
        assert torch.equal(index, same) and torch.equal(records, again)
        assert torch.equal(records, torch.stack([cache[int(i)][0] for i in index]))
        latents = cache.latents(records, index % 2 == 0, torch.randn(5, *cache.latent_shape))
        assert latents.shape == (5, 4, 4, 4) and cache.labels[index].tolist() == [int(i) % 3 for i in index]
    with pytest.raises(IndexError):
        cache[10]


def test_another_process_gets_the_folder_not_the_latents(tmp_path, vae):
    cache = build(tmp_path, VaeCodec(vae), length=40, shard_size=40, num_classes=7)
    record, _ = cache[39]
    sent = pickle.dumps(cache)
    assert len(sent) < cache._shard(0).nbytes / 4
    assert torch.equal(pickle.loads(sent)[39][0], record) and pickle.loads(sent).num_classes == 7
