"""Codecs; the conversion of KL-16 against a slow reference of the latent diffusion VAE that is written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from timm_collapse.hub import vae_weights
from timm_collapse.hub.vae_weights import convert_kl16, kl16_config, load_kl16
from timm_collapse.models import PixelCodec, VaeCodec, load_codec
from timm_collapse.order import CollapseError

WIDTHS = (32, 32, 64, 64, 128)
SMALL = {**kl16_config(), "block_out_channels": WIDTHS}


def tiny_vae(**kwargs):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **kwargs,
    ).eval()


# -- pixels and a VAE --------------------------------------------------------------------------------------------------


def test_pixels_are_z_scored_and_come_back():
    codec = PixelCodec(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))
    images = torch.rand(2, 3, 4, 6)
    latents, std = codec.moments(images)
    assert std is None and (codec.channels, codec.stride) == (3, 1)
    assert torch.allclose(latents[:, 2], (images[:, 2] - 0.3) / 0.1, atol=1e-5)
    assert torch.allclose(codec.decode(latents), images, atol=1e-6)
    assert codec.decode(torch.full((1, 3, 1, 1), 9.0)).eq(1).all() and codec.decode(latents * 0 - 9).eq(0).all()


@pytest.mark.parametrize("images", [torch.rand(1, 3, 4, 4) * 2 - 1, torch.rand(1, 3, 4, 4) * 255])
def test_images_that_are_not_in_0_1_are_refused(images):
    with pytest.raises(CollapseError, match=r"images: pixels must be in \[0, 1\].*got"):
        PixelCodec().moments(images)


def test_pixel_codec_refuses_a_std_of_0():
    with pytest.raises(CollapseError, match="std positive"):
        PixelCodec(std=(0.2, 0.0, 0.2))


@pytest.mark.parametrize("scale,shift", [(None, None), (2.0, None), (None, 0.7)])
def test_vae_moments_and_decoded_images_are_those_of_diffusers(scale, shift):
    vae = tiny_vae(scaling_factor=0.5, shift_factor=shift)
    codec = VaeCodec(vae, scale)
    used, images = scale or 0.5, torch.rand(2, 3, 8, 12)
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
        decoded = vae.decode(posterior.mean).sample
    mean, std = codec.moments(images)
    assert (codec.channels, codec.stride) == (4, 2) and mean.shape == std.shape == (2, 4, 4, 6)
    assert torch.allclose(mean, (posterior.mean - (shift or 0)) * used, atol=1e-6)
    assert torch.allclose(std, posterior.std * used, atol=1e-6)
    assert torch.allclose(codec.decode(mean), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert not any(p.requires_grad for p in codec.parameters()) and not codec.train().vae.training


def test_vae_codec_names_a_wrong_size_or_scale():
    codec = VaeCodec(tiny_vae())
    with pytest.raises(CollapseError, match=r"multiples of 2, got \(7, 8\)"):
        codec.moments(torch.rand(1, 3, 7, 8))
    with pytest.raises(CollapseError, match="scale: must be positive"):
        VaeCodec(tiny_vae(), scale=0.0)


def test_identity_tells_weights_and_scales_apart():
    vae = tiny_vae()
    codec = VaeCodec(vae)
    first = codec.identity
    assert first == VaeCodec(vae).identity != VaeCodec(vae, 0.3).identity
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1
    assert codec.identity != first


def test_load_codec_from_a_folder(tmp_path):
    vae = tiny_vae(scaling_factor=0.3)
    vae.save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path))
    images = torch.rand(1, 3, 8, 8)
    assert codec.scale == 0.3 and torch.equal(codec.moments(images)[0], VaeCodec(vae).moments(images)[0])
    assert load_codec(str(tmp_path), 0.7).scale == 0.7 and isinstance(load_codec("pixels"), PixelCodec)


def test_load_codec_says_what_it_looked_for(tmp_path):
    with pytest.raises(CollapseError, match=rf"AutoencoderKL.*config.json.*folder '{tmp_path}'"):
        load_codec(str(tmp_path))
    with pytest.raises(CollapseError, match="'nobody/nothing', no local folder, on the Hub"):
        load_codec("nobody/nothing")
    with pytest.raises(CollapseError, match="'nothing' is neither a local folder"):
        load_codec("nothing")
    with pytest.raises(CollapseError, match="KL-16 at 'no.ckpt'"):
        load_codec("no.ckpt")
    with pytest.raises(CollapseError, match="scale: is for a VAE"):
        load_codec("pixels", 0.5)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CollapseError, match="found UNet2DModel"):
        load_codec(str(tmp_path))


def test_a_folder_that_lacks_weights_is_not_filled_with_random_ones(tmp_path):
    tiny_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("encoder.conv_in.weight")
    save_file(weights, file)
    with pytest.raises(CollapseError, match="lack encoder.conv_in.weight"):
        load_codec(str(tmp_path))


# -- KL-16: the VAE of the latent diffusion code, slowly ---------------------------------------------------------------


class Reference:
    """Encoder and decoder in LDM's names; a weight is drawn when it is first asked for."""

    def __init__(self):
        self.state = {}

    def get(self, name, shape, scale, offset=0.0):
        if name not in self.state:
            self.state[name] = torch.randn(shape) * scale + offset
        return self.state[name]

    def conv(self, name, x, out, kernel=3, **kwargs):
        weight = self.get(f"{name}.weight", (out, x.shape[1], kernel, kernel), (x.shape[1] * kernel**2) ** -0.5)
        return F.conv2d(x, weight, self.get(f"{name}.bias", (out,), 0.1), **kwargs)

    def norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        normed = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        weight, bias = (self.get(f"{name}.{n}", x.shape[1], 0.2, o) for n, o in (("weight", 1.0), ("bias", 0.0)))
        return normed * weight[:, None, None] + bias[:, None, None]

    def swish_norm(self, name, x):
        y = self.norm(name, x)
        return y * torch.sigmoid(y)

    def block(self, name, x, out):
        h = self.conv(f"{name}.conv1", self.swish_norm(f"{name}.norm1", x), out, padding=1)
        h = self.conv(f"{name}.conv2", self.swish_norm(f"{name}.norm2", h), out, padding=1)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, kernel=1))

    def attention(self, name, x):
        channels, normed = x.shape[1], self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{n}", normed, channels, kernel=1).flatten(2) for n in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(channels)).softmax(-1)
        h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", h, channels, kernel=1)

    def middle(self, side, x):
        x = self.block(f"{side}.mid.block_1", x, x.shape[1])
        return self.block(f"{side}.mid.block_2", self.attention(f"{side}.mid.attn_1", x), x.shape[1])

    def encode(self, images):
        x = self.conv("encoder.conv_in", images, WIDTHS[0], padding=1)
        for level, width in enumerate(WIDTHS):
            for number in range(2):
                x = self.block(f"encoder.down.{level}.block.{number}", x, width)
                if level == len(WIDTHS) - 1:
                    x = self.attention(f"encoder.down.{level}.attn.{number}", x)
            if level < len(WIDTHS) - 1:
                padded = F.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{level}.downsample.conv", padded, width, stride=2)
        x = self.swish_norm("encoder.norm_out", self.middle("encoder", x))
        x = self.conv("quant_conv", self.conv("encoder.conv_out", x, 32, padding=1), 32, kernel=1)
        return x[:, :16], (x[:, 16:].clamp(-30, 20) / 2).exp()

    def decode(self, latents):
        x = self.conv("post_quant_conv", latents, 16, kernel=1)
        x = self.middle("decoder", self.conv("decoder.conv_in", x, WIDTHS[-1], padding=1))
        for level in reversed(range(len(WIDTHS))):
            for number in range(3):
                x = self.block(f"decoder.up.{level}.block.{number}", x, WIDTHS[level])
            if level:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, WIDTHS[level], padding=1)
        return self.conv("decoder.conv_out", self.swish_norm("decoder.norm_out", x), 3, padding=1)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(1)
    reference = Reference()
    images, latents = torch.rand(2, 3, 64, 48), torch.randn(2, 16, 4, 3)
    reference.images, reference.given = images, latents
    reference.moments, reference.decoded = reference.encode(images * 2 - 1), reference.decode(latents)
    return reference


@pytest.mark.parametrize("name,nested", [("kl16.ckpt", "model"), ("v.pth", "state_dict"), ("kl16.safetensors", None)])
def test_converted_kl16_gives_what_the_reference_gives(reference, tmp_path, name, nested):
    path, state = tmp_path / name, {**reference.state, "loss.logvar": torch.zeros(1)}
    torch.save({nested: state, "epoch": 3}, path) if nested else save_file(state, path)
    codec = VaeCodec(load_kl16(path, SMALL))
    assert codec.scale == 0.2325 and (codec.channels, codec.stride) == (16, 16)
    mean, std = codec.moments(reference.images)
    assert torch.allclose(mean / 0.2325, reference.moments[0], atol=1e-4)
    assert torch.allclose(std / 0.2325, reference.moments[1], atol=1e-4)
    assert torch.allclose(codec.vae.decode(reference.given).sample, reference.decoded, atol=1e-4)
    assert reference.decoded.std() > 0.1 and reference.moments[0].std() > 0.1  # not equal because all is 0


def test_load_codec_takes_a_kl16_file(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(vae_weights, "kl16_config", lambda: SMALL)
    save_file(reference.state, tmp_path / "kl16.safetensors")
    mean, _ = load_codec(str(tmp_path / "kl16.safetensors")).moments(reference.images)
    assert torch.allclose(mean / 0.2325, reference.moments[0], atol=1e-4)


def test_kl16_has_the_published_size():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**kl16_config())
    assert sum(p.numel() for p in vae.parameters()) == 66_456_019
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 16


def test_kl16_with_missing_unknown_or_misshapen_weights_is_refused(reference, tmp_path):
    path = tmp_path / "kl16.safetensors"
    state = dict(reference.state)
    state["decoder.up.4.attn.0.q.weight"] = state.pop("encoder.down.4.attn.1.q.weight")
    save_file(state, path)
    expected = (
        "missing encoder.down_blocks.4.attentions.1.to_q.weight; unexpected decoder.up_blocks.0.attentions.0.to_q"
    )
    with pytest.raises(CollapseError, match=expected):
        load_kl16(path, SMALL)
    save_file(reference.state, path)
    with pytest.raises(CollapseError, match="other shapes than KL-16"):
        load_kl16(path, {**SMALL, "latent_channels": 8})
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CollapseError, match="missing.* and 308 more; unexpected a"):
        load_kl16(path, SMALL)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("content", [Payload(), None])
def test_a_file_that_is_more_than_weights_is_not_unpickled(tmp_path, content):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": {"a": content}}, path) if content else path.write_bytes(b"PK damaged")
    with pytest.raises(CollapseError, match="is damaged or holds more than tensors"):
        load_kl16(path, SMALL)


def test_convert_kl16_reverses_the_levels_of_the_decoder_only(reference):
    converted = convert_kl16(reference.state)
    assert len(converted) == len(reference.state)
    first = converted["decoder.up_blocks.0.resnets.0.conv1.weight"]
    assert first is reference.state["decoder.up.4.block.0.conv1.weight"]
    assert converted["encoder.down_blocks.0.resnets.0.conv1.weight"].shape == (32, 32, 3, 3)
