"""What the ranker learns from a frozen ViT: sets of patches, and how far each leaves the ViT from its own output.

No labels: the target is what the same ViT says of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..collapse.base import Collapsed
from ..models.ranker import Ranker
from ..models.transformer import use_plain_attention
from ..order import CollapseError, Order, jitter_order

SMALLEST_SPLIT = 16
"""Tokens: of fewer there is hardly a cell to choose."""


class FeatureLesson:
    """Draws sets of equal size for each image and measures what a frozen ViT loses on each.

    Every step has one token budget, log-uniform up to `max_share` of the patches, and one visible set an image: empty
    (4 steps in 10), or of random size. Half of the sets complete it at random, half as the policy would, jittered.
    Sets of one size differ in nothing but which patches they hold, and that is what an order is to know. With the
    remainder "split" a set is that of the patches in small cells, nothing is visible before, and budgets are at least
    16 tokens.

    Args:
        vit: A collapsed ViT, used to sets of patches (one trained with random drop) or to the remainder; frozen here.
        num_sets: Sets an image, at least 2.
        remainders: One of these is drawn each step, see `Collapsed`; not "mixed" and "zoom", which have cells of more
            than two sizes, and so no set to learn.
        max_share: Largest budget, as a share of the patches.
    """

    def __init__(
        self, vit: Collapsed, num_sets: int = 8, remainders: Sequence[str] = ("none",), max_share: float = 0.6
    ):
        if num_sets < 2:
            raise CollapseError(f"sets: must be at least 2, as sets of one image are compared, got {num_sets}")
        if {"mixed", "zoom"} & set(remainders):
            raise CollapseError(f"remainders must be of none, fused, coarse and split, got {', '.join(remainders)}")
        self.vit = vit.eval().requires_grad_(False)
        if next(vit.parameters()).device.type == "cpu":
            use_plain_attention(vit)
        self.num_sets, self.remainders, self.max_share = num_sets, tuple(remainders), max_share

    @torch.no_grad()
    def __call__(self, images: Tensor, random, policy: Ranker | None, policy_images: Tensor) -> tuple[Tensor, ...]:
        """Sets and errors for one batch.

        Args:
            images: (B, C, H, W), normalised for the ViT.
            random: Source of `rand(batch, *shape)`, `uniform()` and `randint(low, high)` (a `Run`).
            policy: The ranker whose own sets are among those that are measured; None: all are random.
            policy_images: The same images, normalised for the ranker.

        Returns:
            visible (B, N) bool, revealed (B, sets, N), 1 where revealed and the share of patches that are so in part,
            and errors (B, sets), for `Ranker.forward`.
        """
        vit, b = self.vit, len(images)
        grid = vit.image_grid(images)
        n = grid[0] * grid[1]
        vit.remainder = self.remainders[random.randint(0, len(self.remainders))]
        cells = vit.remainder == "split"
        least = SMALLEST_SPLIT if cells else 1
        budget = round(least * max(1.0, self.max_share * n / least) ** random.uniform())
        plan = vit.plan(budget, grid)
        size = plan.places
        start = 0 if random.randint(0, 10) < 4 or cells else random.randint(0, size)
        ahead = None
        if policy is not None:
            ahead = Order(policy.rank(policy_images, upto=size), grid)
        first = random.rand(b, n)
        if ahead is not None and random.randint(0, 2):
            first = jitter_order(ahead, 0.1, first.clamp(1e-6, 1 - 1e-6)).ranks / n
        order = first.argsort(1)
        visible = torch.zeros(b, n, dtype=torch.bool, device=images.device).scatter(1, order[:, :start], True)
        if ahead is not None and start:
            ahead = Order.from_indices(policy.picks(policy.static(policy_images), visible)[0], grid)

        vit.keep = 1.0
        whole = self._output(images)
        vit.keep = budget if budget >= 2 else budget / n
        sets, errors = [], []
        for i in range(self.num_sets):
            noise = random.rand(b, n)
            scores = noise
            if ahead is not None and i % 2:
                scores = jitter_order(ahead, 0.05 + 0.3 * random.uniform(), noise).scores
            order = Order(scores + visible * (scores.amax() - scores.amin() + 1.0), grid)
            sets.append(plan.detailed(order))
            seen = self._output(images, order)
            errors.append(output_distance(seen, whole, vit.num_classes))
        return visible, torch.stack(sets, 1), torch.stack(errors, 1)

    def _output(self, images: Tensor, order: Order | None = None) -> Tensor:
        """Logits (B, classes), or pooled features (B, D) of a ViT without a classifier."""
        return self.vit(images, order=order).float()


def output_distance(output: Tensor, whole: Tensor, num_classes: int) -> Tensor:
    """How far outputs are from those for the whole image, (B,).

    Args:
        output, whole: Logits (B, classes), or pooled features (B, D) of a ViT without a classifier.
        num_classes: Of the ViT; 0: these are features.

    Returns:
        Root of the Kullback-Leibler divergence of class probabilities (from the whole image's), or of 1 - cosine.
    """
    if num_classes:
        divergence = F.kl_div(output.log_softmax(-1), whole.log_softmax(-1), reduction="none", log_target=True)
        return divergence.sum(-1).clamp_min(0).sqrt()
    return (1 - F.cosine_similarity(output, whole, dim=-1)).clamp_min(0).sqrt()
