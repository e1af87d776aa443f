"""One-pass orderer: from an image to the order of its patches, in one cheap pass or a few cheap phases.

A small transformer sees the image and which patches are already visible, and predicts a factor model of what is left
unknown (`order/factors.py`); the order is greedy under that model, so redundancy counts. It learns by regression: for
random and for its own visible sets, the error map that a frozen reconstructor leaves (`train/ranker.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..order import CollapseError, check_images, expected_errors, greedy_factor_order
from ..order.order import stable_argsort
from .registry import build, pixel_cfg
from .tokenizer import patchify, resize_images
from .transformer import Transformer, border_distances, init_weights


def check_phases(phases: tuple[float, ...]) -> None:
    """Raises CollapseError unless phases ascend from 0 and stay below 1."""
    if not phases or phases[0] != 0 or list(phases) != sorted(set(phases)) or phases[-1] >= 1:
        raise CollapseError(f"phases must ascend from 0 and stay below 1, got {phases}")


class Ranker(nn.Module):
    """Predicts which patches explain the others.

    Args:
        img_size: Images are resized to this square side (pixels); the grid is img_size / patch_size a side.
        patch_size: Patch side in pixels at that size.
        dim, depth: Width and blocks of the transformer.
        static_depth: Blocks that run before the network is told what is visible: later phases reuse their result.
        rank: Number r of latent factors.
        phases: Shares of the patches, ascending from 0, at which the factors are predicted anew, given what is visible.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        dim: int = 128,
        depth: int = 4,
        static_depth: int = 0,
        rank: int = 32,
        phases: tuple[float, ...] = (0.0, 0.06, 0.16, 0.3, 0.5),
    ):
        super().__init__()
        check_phases(phases)
        if img_size % patch_size:
            raise CollapseError(f"img_size: must be a multiple of patch_size={patch_size}, got {img_size}")
        self.img_size, self.patch_size, self.phases = img_size, patch_size, tuple(phases)
        if not 0 <= static_depth < depth:
            raise CollapseError(f"static_depth must be in [0, depth={depth}), got {static_depth}")
        self.static_depth = static_depth
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.embed = nn.Linear(3 * patch_size**2, dim)
        self.border = nn.Linear(4, dim)
        self.visible_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.trunk = Transformer(dim, depth)
        self.loadings = nn.Linear(dim, rank)
        self.log_noise = nn.Linear(dim, 1)
        init_weights(self)
        nn.init.constant_(self.log_noise.bias, -2.0)
        nn.init.trunc_normal_(
            self.loadings.weight, std=0.08 / dim**0.5 * 32**0.5 / rank**0.5
        )  # errors start at about .5

    def static(self, images: Tensor) -> Tensor:
        """What does not depend on the visible set: (B, C, H, W), normalised -> tokens (B, N, dim)."""
        tokens = patchify(resize_images(images, (self.img_size, self.img_size)), self.patch_size)
        dtype = self.embed.weight.dtype
        x = self.embed(tokens.to(dtype)) + self.border(border_distances(self.grid, tokens.device).to(dtype))
        return self.trunk.run(x, self.grid, stop=self.static_depth)

    def factors(self, static: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Factor model of the error that is left.

        Args:
            static: (B, N, dim), from `static`.
            visible: (B, N) bool.

        Returns:
            loadings (B, N, r) and noise (B, N), for `expected_errors` and `greedy_factor_order`.
        """
        x = static + visible.unsqueeze(-1) * self.visible_token.to(static.dtype)
        x = self.trunk.norm(self.trunk.run(x, self.grid, start=self.static_depth))
        return self.loadings(x).float(), F.softplus(self.log_noise(x).squeeze(-1).float()) + 1e-4

    def forward(self, images: Tensor, visible: Tensor, revealed: Tensor, errors: Tensor) -> dict[str, Tensor]:
        """Regression losses.

        Args:
            images: (B, C, H, W), normalised.
            visible: (B, N) bool: the set that the network is told of.
            revealed: (B, C, N) bool: sets that contain it; revealed[:, 0] is the visible set itself.
            errors: (B, C, N): the errors that the frozen reconstructor leaves after each set, 0 where revealed; or
                (B, C): one error for each of C sets of equal size (`FeatureLesson`).

        Returns:
            loss, and its parts: `map`, squared error of the error maps, and `gain`, Huber loss of what each set
            removes in all from the visible one (that is what the greedy choice compares). For one error a set:
            `unexplained`, the share of the variance among an image's sets that is not predicted, and `level`.
        """
        predicted = expected_errors(*self.factors(self.static(images), visible), revealed)
        if errors.ndim == 2:
            return _set_losses(predicted.mean(-1), errors)
        hidden = ~revealed
        error_map = ((predicted - errors).square() * hidden).sum() / hidden.sum().clamp_min(1)
        gain = errors[:, :1].sum(-1) - errors[:, 1:].sum(-1)
        predicted_gain = predicted[:, :1].sum(-1) - predicted[:, 1:].sum(-1)
        # Sets that reveal more have larger gains; per revealed patch they weigh alike.
        added = (revealed[:, 1:].sum(-1) - revealed[:, :1].sum(-1)).clamp_min(1)
        gain_loss = (F.smooth_l1_loss(predicted_gain, gain, reduction="none") / added).mean()
        return {"loss": error_map + 0.1 * gain_loss, "map": error_map.detach(), "gain": gain_loss.detach()}

    @torch.no_grad()
    def rank(self, images: Tensor, upto: int | None = None, phases: tuple[float, ...] | None = None) -> Tensor:
        """Scores (B, N) on the ranker's own grid, higher = earlier.

        Args:
            images: (B, C, H, W), normalised; any size.
            upto: Only the first `upto` places are needed: later phases are saved, the rest follows by its last gain.
            phases: Other phases than the model's own.
        """
        check_images(images, values=False)
        n = self.num_patches
        upto = n if upto is None else min(upto, n)
        if phases is not None:
            check_phases(phases)
        starts = [round(share * n) for share in (self.phases if phases is None else phases)]
        stops = [*starts[1:], upto]
        visible = torch.zeros(images.shape[0], n, dtype=torch.bool, device=images.device)
        scores = torch.zeros(images.shape[0], n, device=images.device)
        static = self.static(images)
        for start, stop in zip(starts, stops):
            count = min(stop, upto) - start
            if count <= 0:  # a small grid, or beyond `upto`
                continue
            picks, gains = greedy_factor_order(*self.factors(static, visible), visible, count)
            visible = visible.scatter(1, picks, 1)  # not True: jit.trace knows no bool there
            places = torch.arange(start, start + count, device=images.device, dtype=scores.dtype)
            scores.scatter_(1, picks, ((n - places) / n).expand(images.shape[0], -1))
        if upto < n:
            rest = stable_argsort(gains, descending=True)[:, : n - upto]
            places = torch.arange(upto, n, device=images.device, dtype=scores.dtype)
            scores.scatter_(1, rest, ((n - places) / n).expand(images.shape[0], -1))
        return scores


def _set_losses(predicted: Tensor, errors: Tensor) -> dict[str, Tensor]:
    """Losses of one error a set, (B, C): mostly of the differences among the sets of an image."""
    level, true_level = predicted.mean(1, keepdim=True), errors.mean(1, keepdim=True)
    spread = (errors - true_level).square().mean().clamp_min(1e-8)
    unexplained = ((predicted - level) - (errors - true_level)).square().mean() / spread
    level_loss = (level - true_level).square().mean()
    return {"loss": unexplained + level_loss, "unexplained": unexplained.detach(), "level": level_loss.detach()}


default_cfgs = generate_default_cfgs(
    {
        "collapse_ranker_tiny.tin100": pixel_cfg("collapse_ranker_tiny.tin100"),
        "collapse_ranker_tiny.tin100_features": pixel_cfg("collapse_ranker_tiny.tin100_features"),
        "collapse_ranker_tiny.cifar10_features": pixel_cfg("collapse_ranker_tiny.cifar10_features"),
        "collapse_ranker_tiny_224.photos": pixel_cfg("collapse_ranker_tiny_224.photos", img_size=224),
        "collapse_ranker_tiny_224_rerun.photos": pixel_cfg("collapse_ranker_tiny_224_rerun.photos", img_size=224),
    }
)


@register_model
def collapse_ranker_tiny(pretrained: bool = False, **kwargs) -> Ranker:
    """4 blocks of width 128 on 8 px patches of 64 px images.

    `.tin100` knows which patches explain the pixels of the others; `.tin100_features` and `.cifar10_features` which
    bring a ViT's output nearest to the one for the whole image.
    """
    return build(Ranker, "collapse_ranker_tiny", pretrained, {}, kwargs)


_PHASES_224 = (0.0, 0.02, 0.05, 0.09, 0.13, 0.18, 0.24, 0.34, 0.45, 0.6)


@register_model
def collapse_ranker_tiny_224(pretrained: bool = False, **kwargs) -> Ranker:
    """The same on a 14 x 14 grid: images are resized to 112 px, so that a patch stands for 16 px of a 224 px image.

    Three of four blocks run once, the last one in each phase: the order's first 22% cost at most .5 GMACs.
    """
    defaults = {"img_size": 112, "static_depth": 3, "phases": _PHASES_224}
    return build(Ranker, "collapse_ranker_tiny_224", pretrained, defaults, kwargs)


@register_model
def collapse_ranker_tiny_224_rerun(pretrained: bool = False, **kwargs) -> Ranker:
    """As `collapse_ranker_tiny_224`, but every phase runs all blocks: a better order for about three times the cost."""
    defaults = {"img_size": 112, "phases": _PHASES_224}
    return build(Ranker, "collapse_ranker_tiny_224_rerun", pretrained, defaults, kwargs)
