import pytest
import torch

from timm_collapse.models import PixelTokenizer, VaeCodec, VaeTokenizer, patchify, unpatchify
from timm_collapse.order import CollapseError


def test_patchify_reads_rows_of_patches_and_features_as_c_p_q():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 12)
    expected = images[1, :, 2:4, 4:6].reshape(-1)  # row 1, column 2 of a 2 x 3 grid
    assert torch.equal(tokens[1, 5], expected)


@pytest.mark.parametrize("size,patch", [((8, 8), 2), ((4, 12), 4), ((3, 5), 1)])
def test_unpatchify_inverts(size, patch):
    images = torch.randn(2, 3, *size)
    grid = (size[0] // patch, size[1] // patch)
    assert torch.equal(unpatchify(patchify(images, patch), grid, patch), images)


def test_pixel_tokenizer_refuses_sizes_that_do_not_divide():
    with pytest.raises(CollapseError, match="patch_size=8.*63x64"):
        PixelTokenizer(8)(torch.zeros(1, 3, 63, 64))


def make_vae(**kwargs):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        **kwargs,
    ).eval()


@pytest.fixture(scope="module")
def small_vae():
    return make_vae()


def test_vae_tokenizer_scales_posterior_means_and_decodes_back(small_vae, tmp_path):
    small_vae.save_pretrained(tmp_path)
    tokenizer = VaeTokenizer(str(tmp_path))  # a folder, as diffusers saves it
    images = torch.randn(2, 3, 16, 16)
    tokens = tokenizer(images)
    means = small_vae.eval().encode(images).latent_dist.mean
    assert tokenizer.dim == 4 and tokenizer.grid((16, 16)) == (8, 8)
    assert torch.allclose(tokens, patchify(means * 0.5, 1), atol=1e-6)
    assert torch.allclose(tokenizer.decode(tokens, (8, 8)), small_vae.decode(means).sample, atol=1e-5)
    assert not any(p.requires_grad for p in tokenizer.parameters())
    tokenizer.train()
    assert not tokenizer.vae.training


def test_tokenizer_and_codec_normalise_by_scale_and_shift():
    vae = make_vae(shift_factor=0.7)
    images = torch.rand(2, 3, 8, 12)
    with torch.no_grad():
        means = vae.encode(2 * images - 1).latent_dist.mean
        pixels = vae.decode(means).sample
    expected = (means - 0.7) * 0.5
    tokenizer, codec = VaeTokenizer(vae), VaeCodec(vae)
    tokens, (latents, _) = tokenizer(2 * images - 1), codec.moments(images)
    assert torch.allclose(tokens, patchify(expected, 1), atol=1e-6) and torch.allclose(latents, expected, atol=1e-6)
    assert torch.allclose(tokenizer.decode(tokens, (4, 6)), pixels, atol=1e-5)
    assert torch.allclose(codec.decode(latents), (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert tokenizer.state_dict().keys() == codec.state_dict().keys()
    for kind in (VaeTokenizer, VaeCodec):
        with pytest.raises(CollapseError, match="scale: must be positive and finite, got -1"):
            kind(vae, -1.0)


def test_vae_tokenizer_own_scale_and_bad_size(small_vae):
    assert torch.allclose(
        VaeTokenizer(small_vae, scale=2.0)(torch.ones(1, 3, 8, 8)),
        4 * VaeTokenizer(small_vae)(torch.ones(1, 3, 8, 8)),
        atol=1e-6,
    )
    with pytest.raises(CollapseError, match="multiples of 2"):
        VaeTokenizer(small_vae)(torch.ones(1, 3, 7, 8))
