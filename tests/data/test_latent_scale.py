import math

import pytest
import torch

from timm_collapse.data.latent_scale import latent_scale
from timm_collapse.models import PixelCodec
from timm_collapse.order import CollapseError


class Gaussians:
    """A stand-in for a codec: latents are the first two channels, stretched, with a posterior noise of 0.5."""

    channels, stride = 2, 1

    def __init__(self, scale=1.0, noise=True):
        self.scale, self.noise = scale, noise

    def moments(self, images):
        mean = images[:, :2] * torch.tensor([4.0, 2.0]).view(2, 1, 1) + 1
        return mean * self.scale, torch.full_like(mean, 0.5 * self.scale) if self.noise else None


def test_scale_of_known_gaussians():
    batches = [torch.randn(n, 3, 16, 16) for n in (7, 20, 1, 64)]
    found = latent_scale(Gaussians(), batches)
    expected = math.sqrt((4.0**2 + 2.0**2) / 2 + 0.5**2)
    assert found.std == pytest.approx(expected, rel=0.02) and found.scale == pytest.approx(1 / found.std)
    assert found.channel_std == pytest.approx((math.sqrt(16.25), math.sqrt(4.25)), rel=0.02)
    assert found.mean == pytest.approx(1, abs=0.08) and found.images == 92
    assert 0 < found.difference < 0.05 * found.scale
    again = latent_scale(Gaussians(scale=0.1), batches)  # the scale in use is undone
    assert again.std == pytest.approx(found.std) and again.mean == pytest.approx(found.mean)


def test_scale_is_that_of_all_values_and_its_error_that_of_two_halves():
    images = torch.rand(11, 3, 4, 4)
    found = latent_scale(Gaussians(noise=False), images.split((3, 5, 2, 1)))
    latents = Gaussians(noise=False).moments(images)[0]
    assert found.std == pytest.approx(float(latents.std(correction=0)), rel=1e-5)
    halves = [1 / float(latents[half::2].std(correction=0)) for half in (0, 1)]
    assert found.difference == pytest.approx(abs(halves[0] - halves[1]), rel=1e-3)


def test_scale_needs_images_that_differ():
    with pytest.raises(CollapseError, match="at least 2 images, got 1"):
        latent_scale(PixelCodec(), [torch.rand(1, 3, 4, 4)])
    with pytest.raises(CollapseError, match="all latents are equal"):
        latent_scale(PixelCodec(), [torch.full((2, 3, 4, 4), 0.5)])
