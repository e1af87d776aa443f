"""One-pass orderer: from an image to the order of its patches, in one cheap pass or a few cheap phases.

A small transformer sees the image and which patches are already visible, and predicts a factor model of what is left
unknown (`order/factors.py`); the order is greedy under that model, so redundancy counts. It learns by regression: for
random and for its own visible sets, the error map that a frozen reconstructor leaves (`train/ranker.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..order import (
    CollapseError,
    check_images,
    condition,
    dependencies,
    expected_errors,
    neighbour_kernel,
    parallel_picks,
    single_errors,
)
from ..order.constants import constant
from ..order.precision import without_autocast
from ..order.sorting import stable_argsort
from ..order.spread import bayer_ranks
from .registry import build, pixel_cfg
from .tokenizer import patchify, resize_images
from .transformer import PlainTransformer, Transformer, border_distances, init_weights


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
        rank: Number r of latent factors. 0: patches are independent, and the order is that of their deviations.
        phases: Shares of the patches, ascending from 0, at which the factors are predicted anew, given what is visible.
        cell: Side, in patches, of what one token stands for. 1: one patch, at a rotary position. More: a token predicts
            all of its cell^2 patches, so that there are fewer tokens, at learned positions: far fewer operations.
        rounds: Of `parallel_picks`, in each phase.
        neighbours: Strength of the `neighbour_kernel` that orders are made with, in [0, 1).
        spread_first: Share of the patches, in [0, 1), that come first, by a Bayer spread: before much is visible a
            spread tells most, and costs nothing. Phases that would start before its end are left out, one starts there.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        dim: int = 128,
        depth: int = 4,
        static_depth: int = 0,
        rank: int = 32,
        phases: tuple[float, ...] = (0.0, 0.03, 0.08, 0.16, 0.26, 0.38, 0.52, 0.7),
        cell: int = 1,
        rounds: int = 3,
        neighbours: float = 0.3,
        spread_first: float = 0.0,
    ):
        super().__init__()
        check_phases(phases)
        if img_size % (patch_size * cell):
            raise CollapseError(f"img_size: must be a multiple of patch_size={patch_size} times {cell}, got {img_size}")
        self.img_size, self.patch_size, self.phases = img_size, patch_size, tuple(phases)
        if not 0 <= static_depth < depth:
            raise CollapseError(f"static_depth must be in [0, depth={depth}), got {static_depth}")
        self.static_depth, self.num_factors, self.rounds = static_depth, rank, rounds
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.neighbours = neighbours
        neighbour_kernel(self.grid, neighbours)  # checks
        if rank < 0:
            raise CollapseError(f"rank must be at least 0, got {rank}")
        if not 0 <= spread_first < 1:
            raise CollapseError(f"spread_first must be in [0, 1), got {spread_first}")
        self.spread_first = spread_first
        self.cell = cell
        self.embed = nn.Linear(3 * (cell * patch_size) ** 2, dim)
        if cell == 1:
            self.border = nn.Linear(4, dim)
            self.trunk = Transformer(dim, depth)
            self.loadings = nn.Linear(dim, rank)
            self.log_noise = nn.Linear(dim, 1)
        else:
            cells = [side // cell for side in self.grid]
            self.positions = nn.Parameter(build_sincos2d_pos_embed(cells, dim).unsqueeze(0))
            self.trunk = PlainTransformer(dim, depth, self.num_patches // cell**2)
            self.head = nn.Linear(dim, cell**2 * (rank + 1))  # a patch's loadings, and the logarithm of its noise
        self.visible_token = nn.Parameter(torch.zeros(1, cell**2, dim))
        init_weights(self)
        with torch.no_grad():
            loadings, noise_bias = self._loadings_and_noise_bias()
            std = 0.08 * (32 / dim / max(1, rank)) ** 0.5  # errors start at about .5
            nn.init.trunc_normal_(loadings, std=std)
            noise_bias.fill_(-2.0)

    @property
    def kernel(self) -> Tensor:
        """(N, N), what two patches share by their places alone: see `neighbour_kernel`."""
        return constant(neighbour_kernel, self.grid, self.neighbours, device=self.visible_token.device)

    def _loadings_and_noise_bias(self) -> tuple[Tensor, Tensor]:
        """Views of the weights that make the loadings, and of the noise's bias."""
        if self.cell == 1:
            return self.loadings.weight, self.log_noise.bias
        shape = self.cell**2, self.num_factors + 1
        return self.head.weight.unflatten(0, shape)[:, :-1], self.head.bias.unflatten(0, shape)[:, -1]

    def static(self, images: Tensor) -> Tensor:
        """What does not depend on the visible set: (B, C, H, W), normalised -> tokens (B, N / cell^2, dim)."""
        tokens = patchify(resize_images(images, (self.img_size, self.img_size)), self.cell * self.patch_size)
        dtype = self.embed.weight.dtype
        if self.cell == 1:
            where = self.border(border_distances(self.grid, tokens.device).to(dtype))
        else:
            where = self.positions
        x = self.embed(tokens.to(dtype)) + where
        return self.trunk.run(x, self.grid, stop=self.static_depth)

    def factors(self, static: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Factor model of the error that is left where some patches are visible.

        Args:
            static: (B, N / cell^2, dim), from `static`.
            visible: (B, N) bool; None: nothing is.

        Returns:
            loadings (B, N, r) and noise (B, N), for `expected_errors` and `parallel_picks`; those of visible patches
            mean nothing.
        """
        x, c = static, self.cell
        h, w = (side // c for side in self.grid)
        if visible is not None:
            told = visible.view(-1, h, c, w, c).transpose(2, 3).to(x.dtype, memory_format=torch.contiguous_format)
            with without_autocast(x):
                x = torch.addmm(x.flatten(0, 1), told.view(-1, c * c), self.visible_token[0].to(x.dtype)).view_as(x)
        x = self.trunk.run(x, self.grid, start=self.static_depth)
        with without_autocast(x):  # the order hangs on small differences of what comes out
            x = self.trunk.norm(x.to(self.trunk.norm.weight.dtype))
            if c == 1:
                loadings, noise = self.loadings(x).float(), self.log_noise(x).squeeze(-1).float()
            else:
                found = rearrange(self.head(x), "b (h w) (p q r) -> b (h p w q) r", h=h, p=c, q=c).float()
                loadings, noise = found[..., :-1], found[..., -1]
        noise = F.softplus(noise) + 1e-4
        if visible is not None:
            loadings = condition(loadings, noise, visible.unsqueeze(1)).squeeze(1)
        return loadings, noise

    def forward(self, images: Tensor, visible: Tensor, revealed: Tensor | None, errors: Tensor) -> dict[str, Tensor]:
        """Regression losses.

        Args:
            images: (B, C, H, W), normalised.
            visible: (B, N) bool: the set that the network is told of.
            revealed: (B, C, N) bool: sets that contain it; revealed[:, 0] is the visible set itself. None: the visible
                set, and with each one patch more, C = 1 + N. With one error a set also shares of patches, in [0, 1].
            errors: (B, C, N): the errors that the teacher leaves after each set, 0 where revealed; or (B, C): one
                error for each of C sets of equal size (`FeatureLesson`).

        Returns:
            loss, and its parts: `map`, squared error of the error maps, and `gain`, Huber loss of what each set
            removes in all from the visible one (that is what the greedy choice compares). For one error a set:
            `unexplained`, the share of the variance among an image's sets that is not predicted, and `level`.
        """
        loadings, noise = self.factors(self.static(images), visible)
        if revealed is None:
            return _imitation_losses(single_errors(loadings, noise), errors, ~visible)
        hidden = ~visible.unsqueeze(1)
        predicted = expected_errors(loadings, noise, revealed * hidden) * hidden
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
    def evidence(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The dependency graph of the factor model where nothing is visible yet: one pass.

        Args:
            images: (B, C, H, W), normalised; any size.

        Returns:
            graph (B, N, N) in [0, 1): A[i, j] = C_ij^2 / (v_i v_j), share of the variance of patch i that patch j alone
            explains (with what neighbours share anyway), 0 on the diagonal; unknown (B, N): the standard deviations.
        """
        unknown, graph = dependencies(*self.factors(self.static(images)), self.kernel)
        return graph.clamp(max=1.0), unknown

    @torch.no_grad()
    def picks(
        self,
        static: Tensor,
        visible: Tensor | None = None,
        weights: Tensor | None = None,
        candidates: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One phase of an order: the next patches where some are visible, by the factors that are predicted there.

        Args:
            static: (B, N / cell^2, dim), from `static`.
            visible: (B, N) bool; None: nothing is.
            weights, candidates: See `parallel_picks`, also for what is returned.
        """
        loadings, noise = self.factors(static, visible)
        if self.num_factors or self.neighbours:
            return parallel_picks(loadings, noise, visible, self.rounds, weights, self.kernel, candidates)
        worth = noise.sqrt() if weights is None else noise.sqrt() * weights  # no patch tells anything of another
        order = stable_argsort(worth if visible is None else worth.masked_fill(visible, -1.0), descending=True)
        return order[:, :candidates], order[:, noise.shape[1] if candidates is None else candidates :]

    def starts(self, phases: tuple[float, ...] | None = None, spread: bool = True) -> list[int]:
        """How many patches are visible where each phase starts.

        Args:
            phases: Other phases than the model's own.
            spread: After those that come by a spread.
        """
        if phases is not None:
            check_phases(phases)
        first = round(self.spread_first * self.num_patches) if spread else 0
        starts = [round(share * self.num_patches) for share in (self.phases if phases is None else phases)]
        return [first, *(start for start in starts[1:] if start > first)]

    @torch.no_grad()
    def rank(
        self,
        images: Tensor,
        upto: int | None = None,
        phases: tuple[float, ...] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Scores (B, N) on the ranker's own grid, higher = earlier.

        Args:
            images: (B, C, H, W), normalised; any size.
            upto: Only the first `upto` places are needed: later phases are saved, the rest follows by its last gain.
            phases: Other phases than the model's own.
            weights: (B, N), see `parallel_picks`. With them no patches come by a spread.
        """
        check_images(images, values=False)
        n = self.num_patches
        shape = images.shape[0], n
        upto = n if upto is None else min(upto, n)
        starts = self.starts(phases, spread=weights is None)
        stops = [*starts[1:], upto]
        static = self.static(images) if upto > starts[0] else None  # a spread looks at nothing
        picks, visible, rest = [], None, ()
        if starts[0]:
            spread = constant(_spread_indices, self.grid, device=images.device).expand(shape)
            picks, rest = [spread[:, : min(starts[0], upto)]], (spread[:, min(starts[0], upto) :],)
        for start, stop in zip(starts, stops):
            if min(stop, upto) <= start:  # a small grid, or beyond `upto`
                continue
            if picks:
                before = torch.cat(picks, 1) if len(picks) > 1 else picks[0]
                # not True: jit.trace knows no bool there
                visible = torch.zeros(shape, dtype=torch.bool, device=images.device).scatter(1, before, 1)
            places = min(stop, upto) - start
            candidates = min(n - start, max(places, (n + 1) // 2))  # as good as all, at a quarter of the operations
            ahead, others = self.picks(static, visible, weights, candidates)
            picks.append(ahead[:, :places])
            rest = ahead[:, places:], others[:, : n - start - candidates]
        scores = torch.linspace(1.0, 1.0 / n, n, device=images.device)
        scores = scores.expand(shape)
        return torch.empty_like(scores).scatter(1, torch.cat([*picks, *rest], 1), scores)


def _spread_indices(grid: tuple[int, int]) -> Tensor:
    return bayer_ranks(grid).argsort()


def _imitation_losses(predicted: Tensor, errors: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """What is not explained of all the errors (B, 1 + N, N) before and after each patch alone, where hidden (B, N).

    Errors fall a hundredfold as more is visible: shares of the teacher's variance weigh each image alike, and their
    logarithm keeps those where the learner is far off from weighing more.
    """
    count, rows = hidden.sum(1, keepdim=True), hidden.unsqueeze(2)
    (own, removed), (wrong_own, wrong_removed) = (
        (e[:, 0] * hidden, (e[:, :1] - e[:, 1:]) * hidden.unsqueeze(1) * rows) for e in (errors, predicted - errors)
    )

    def missing(wrong: Tensor, target: Tensor) -> Tensor:
        variance = ((target - target.sum(1, keepdim=True) / count) * hidden).square().sum(1)
        return wrong.square().sum(1) / variance.clamp_min(1e-4)

    error_map = missing(wrong_own, own)
    gain = missing(wrong_removed.sum(-1) + wrong_own, removed.sum(-1) + own)  # a patch removes its own error, too
    pairs = wrong_removed.square().sum((1, 2)) / (removed.square().sum((1, 2)) + own.square().sum(1)).clamp_min(1e-4)
    parts = {"map": error_map, "gain": gain, "pairs": pairs}
    parts = {name: part.log1p().mean() for name, part in parts.items()}
    return {"loss": sum(parts.values()), **{name: part.detach() for name, part in parts.items()}}


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
        "collapse_ranker_nano_224.photos": pixel_cfg("collapse_ranker_nano_224.photos", img_size=224),
        "collapse_ranker_cells_224.photos": pixel_cfg("collapse_ranker_cells_224.photos", img_size=224),
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


@register_model
def collapse_ranker_tiny_224(pretrained: bool = False, **kwargs) -> Ranker:
    """For photos, 14 x 14 patches: images are resized to 112 px; 4 blocks of width 128 on cells of 2 x 2 patches.

    One block runs once, the others in each phase. The first 22%: 12 patches by a spread, two phases, .08 GMACs.
    """
    phases = (0.0, 0.04, 0.11, 0.23, 0.4, 0.62)
    defaults = {"img_size": 112, "static_depth": 1, "phases": phases, "cell": 2, "spread_first": 0.06}
    return build(Ranker, "collapse_ranker_tiny_224", pretrained, defaults, kwargs)


@register_model
def collapse_ranker_nano_224(pretrained: bool = False, **kwargs) -> Ranker:
    """For small ViTs: looks at 56 px, 3 blocks, the last one in each phase.

    The first 22%: 25 patches by a spread, one phase, .03 GMACs.
    """
    defaults = {"img_size": 56, "patch_size": 4, "depth": 3, "static_depth": 2, "rank": 16, "cell": 2, "rounds": 2}
    defaults |= {"phases": (0.0, 0.07, 0.23, 0.42), "spread_first": 0.13}
    return build(Ranker, "collapse_ranker_nano_224", pretrained, defaults, kwargs)


@register_model
def collapse_ranker_cells_224(pretrained: bool = False, **kwargs) -> Ranker:
    """For the remainder "split": which cells of a photo are to be small so that a ViT's output is that for the whole.

    4 blocks of width 128 on 112 px, one pass, no factors: each of the 14 x 14 patches has a worth of its own, as cells
    that are not split are not unseen. .05 GMACs.
    """
    defaults = {"img_size": 112, "rank": 0, "phases": (0.0,), "cell": 2, "neighbours": 0.0}
    return build(Ranker, "collapse_ranker_cells_224", pretrained, defaults, kwargs)


@register_model
def collapse_ranker_tiny_224_rerun(pretrained: bool = False, **kwargs) -> Ranker:
    """A token for each of the 14 x 14 patches, all 4 blocks in each of ten phases: the teacher of the other two.

    The first 22% cost ten times those of `collapse_ranker_tiny_224`.
    """
    phases = (0.0, 0.02, 0.05, 0.09, 0.13, 0.18, 0.24, 0.34, 0.45, 0.6)
    defaults = {"img_size": 112, "phases": phases}
    return build(Ranker, "collapse_ranker_tiny_224_rerun", pretrained, defaults, kwargs)
