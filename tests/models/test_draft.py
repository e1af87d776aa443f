"""Draft, then reorder: the order is that of the draft's pixels."""

import pytest
import timm
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.models import PixelCodec
from timm_collapse.models.draft import draft_order


@pytest.fixture
def mar():
    shape = dict(encoder_embed_dim=24, encoder_depth=1, decoder_embed_dim=24, decoder_depth=1, diffloss_d=1)
    model = timm.create_model("mar_mini_patch1_8", patch_size=2, diffloss_w=16, num_sampling_steps=3, **shape)
    for parameter in model.parameters():  # else the diffusion head starts at zero, and labels would not matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_order_is_that_of_the_draft(mar):
    codec, orderer = PixelCodec(), CollapseOrder.baseline("variance")
    order = draft_order(mar, codec, orderer, [3, 5], steps=4, diffusion_steps=2, generator=seeded())
    images = codec.decode(mar.generate([3, 5], steps=4, diffusion_steps=2, generator=seeded()))
    assert order.grid == mar.grid == (4, 4) and len(order) == 2
    assert torch.equal(order.ranks, orderer((images - 0.5) / 0.5, grid=(4, 4)).ranks)
    other = draft_order(mar, codec, orderer, [3, 5], steps=4, diffusion_steps=2, generator=seeded(1))
    assert not torch.equal(order.ranks, other.ranks)


def test_images_are_normalised_for_the_orderer(mar):
    orderer, seen = CollapseOrder.baseline("variance"), []
    orderer.mean, orderer.std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    orderer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    draft_order(mar, PixelCodec(), orderer, [0], steps=2, diffusion_steps=2, generator=seeded())
    images = PixelCodec().decode(mar.generate([0], steps=2, diffusion_steps=2, generator=seeded()))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], (images - mean) / std)


def test_a_draft_keeps_the_given_tokens(mar):
    latents, regenerate = torch.randn(1, 3, 8, 8), torch.zeros(16, dtype=torch.bool)
    regenerate[5] = True
    orderer, seen = CollapseOrder.baseline("gradient"), []
    orderer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] / 2 + 0.5))
    draft_order(mar, PixelCodec(), orderer, [0], 1, 2, seeded(), latents, regenerate)
    changed = (seen[0] - PixelCodec().decode(latents)).abs().amax(1)[0] > 1e-5
    assert changed[2:4, 2:4].any() and not changed[:2].any() and not changed[4:].any() and not changed[:, 4:].any()


def test_the_bundled_ranker_orders_a_draft_of_another_grid(mar):
    order = draft_order(mar, PixelCodec(), CollapseOrder.from_pretrained("collapse_ranker_tiny"), [1], 2, 2, seeded())
    assert order.grid == (4, 4) and sorted(order.indices[0].tolist()) == list(range(16))


def test_wrong_arguments(mar):
    with pytest.raises(CollapseError, match="orderer: must be a CollapseOrder, got str"):
        draft_order(mar, PixelCodec(), "variance", [0])
    with pytest.raises(CollapseError, match="steps must be an int in \\[1, 16\\]"):
        draft_order(mar, PixelCodec(), CollapseOrder.baseline("variance"), [0], steps=17)
