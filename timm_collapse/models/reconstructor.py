"""Masked reconstructor: what can be told of the hidden patches from the visible ones.

Trained on random subsets of every size, it is the measure of uncertainty: the judge of all orders (one that no orderer
saw) and, with another seed, shape and other images, the environment in which the ranker learns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .registry import build, pixel_cfg
from .tokenizer import PixelTokenizer
from .transformer import Transformer, border_distances, gather_tokens, init_weights, scatter_tokens


class Reconstruction(NamedTuple):
    """tokens (B, N, D): the prediction; log_scale (B, N): log b of a Laplace likelihood around it."""

    tokens: Tensor
    log_scale: Tensor


class Reconstructor(nn.Module):
    """MAE-like encoder on the visible tokens, decoder on all (He et al., 2022, arXiv 2111.06377).

    Args:
        img_size: Image side in pixels that it is trained on.
        patch_size: Patch side in pixels.
        dim, depth: Encoder width and blocks.
        decoder_dim, decoder_depth: Decoder width and blocks.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        dim: int = 128,
        depth: int = 4,
        decoder_dim: int = 128,
        decoder_depth: int = 3,
    ):
        super().__init__()
        self.tokenizer = PixelTokenizer(patch_size)
        self.img_size = img_size
        self.embed = nn.Linear(self.tokenizer.dim, dim)
        self.empty_token = nn.Parameter(torch.zeros(1, 1, dim))  # lets the encoder run on no visible patch at all
        self.encoder = Transformer(dim, depth, num_prefix_tokens=1)
        self.to_decoder = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.border = nn.Linear(4, decoder_dim)  # rotary positions are relative: this tells where the image ends
        self.decoder = Transformer(decoder_dim, decoder_depth, num_prefix_tokens=1)
        self.head = nn.Linear(decoder_dim, self.tokenizer.dim)
        self.scale_head = nn.Linear(decoder_dim, 1)
        init_weights(self)

    def reconstruct(self, tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Reconstruction:
        """Predict all tokens from the visible ones.

        Args:
            tokens: (B, N, D).
            visible: (B, k) indices of the visible tokens, k >= 0.
            grid: (h, w) with h w = N.
        """
        b, n, _ = tokens.shape
        x = self.embed(gather_tokens(tokens, visible))
        x = self.encoder(torch.cat([self.empty_token.expand(b, -1, -1).to(x.dtype), x], 1), grid, visible)
        x = self.to_decoder(x)
        full = scatter_tokens(x[:, 1:], visible, self.mask_token.expand(b, n, -1).to(x.dtype))
        full = full + self.border(border_distances(grid, x.device))
        y = self.decoder(torch.cat([x[:, :1], full], 1), grid)[:, 1:]
        return Reconstruction(self.head(y).float(), self.scale_head(y.detach()).squeeze(-1).float())

    @torch.no_grad()
    def errors(self, tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """L1 error of every token, mean over its features, (B, N); 0 for the visible ones."""
        error = (self.reconstruct(tokens, visible, grid).tokens - tokens).abs().mean(-1)
        return error.scatter(1, visible, 0.0)

    def forward(self, images: Tensor, noise: Tensor, num_visible: int) -> dict[str, Tensor]:
        """Training losses on one random visible set an image.

        Args:
            images: (B, C, H, W), normalised.
            noise: (B, N) uniform; the num_visible smallest are visible.
            num_visible: 0 to N - 1.
        """
        tokens = self.tokenizer(images)
        grid = self.tokenizer.grid(images.shape[-2:])
        order = noise.argsort(1)
        visible, hidden = order[:, :num_visible], order[:, num_visible:]
        out = self.reconstruct(tokens, visible, grid)
        error = (gather_tokens(out.tokens, hidden) - gather_tokens(tokens, hidden)).abs().mean(-1)
        log_scale = out.log_scale.gather(1, hidden)
        # The scale is fitted to the detached error: it must not reweight the L1 objective.
        nll = (error.detach() * (-log_scale).exp() + log_scale).mean()
        return {"loss": error.mean() + 0.1 * nll, "l1": error.mean().detach(), "nll": nll.detach()}


default_cfgs = generate_default_cfgs(
    {
        "collapse_reconstructor_tiny.untrained": pixel_cfg(),
        "collapse_reconstructor_tiny_224.photos": pixel_cfg("collapse_reconstructor_tiny_224.photos", img_size=224),
    }
)


@register_model
def collapse_reconstructor_tiny(pretrained: bool = False, **kwargs) -> Reconstructor:
    """4 + 3 blocks of width 128 on 8 px patches of 64 px images."""
    return build(Reconstructor, "collapse_reconstructor_tiny", pretrained, {}, kwargs)


@register_model
def collapse_reconstructor_tiny_224(pretrained: bool = False, **kwargs) -> Reconstructor:
    """The same on 16 px patches of photos at 224 px; its weights are a judge that no bundled orderer learned from."""
    defaults = {"img_size": 224, "patch_size": 16}
    return build(Reconstructor, "collapse_reconstructor_tiny_224", pretrained, defaults, kwargs)
