"""What the ranker learns from: visible sets, sets that reveal more, and the errors that a reconstructor leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.ranker import Ranker
from ..models.reconstructor import Reconstructor
from ..models.transformer import use_plain_attention


class Lesson:
    """Draws sets of patches and measures what a frozen reconstructor does not know after each.

    Every step the visible set is empty (4 in 10) or has a random size, small ones more often; of the further
    sets half reveal one patch more, so that gains are learned, the others a log-uniform number, so that a long greedy
    prefix stays calibrated.

    Args:
        reconstructor: The environment; frozen here.
        num_sets: Sets an image beside the visible one.
    """

    def __init__(self, reconstructor: Reconstructor, num_sets: int = 4):
        self.reconstructor = reconstructor.eval().requires_grad_(False)
        if next(reconstructor.parameters()).device.type == "cpu":
            use_plain_attention(self.reconstructor)
        self.num_sets = num_sets

    @torch.no_grad()
    def __call__(self, images: Tensor, random, policy: Ranker | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sets and errors for one batch.

        Args:
            images: (B, C, H, W), normalised.
            random: Source of `rand(batch, *shape)`, `uniform()` and `randint(low, high)` (a `Run`).
            policy: The visible set and the long sets are this ranker's own choice instead of random ones.

        Returns:
            visible (B, N), revealed (B, 1 + sets, N) bool, and errors (B, 1 + sets, N), for `Ranker.forward`.
        """
        b = len(images)
        tokens = self.reconstructor.tokenizer(images)
        grid = self.reconstructor.tokenizer.grid(images.shape[-2:])
        n = tokens.shape[1]
        start = 0 if random.randint(0, 10) < 4 else 1 + int(0.8 * n * random.uniform() ** 2)
        order = random.rand(b, n).argsort(1)
        if policy is not None and start:
            order = policy.rank(images, upto=start).argsort(1, descending=True)
        visible = torch.zeros(b, n, dtype=torch.bool, device=images.device).scatter(1, order[:, :start], True)
        sets, errors = [visible], [self.reconstructor.errors(tokens, order[:, :start], grid)]
        left = math.log(max(1, n - start - 1))
        added = [1 if i % 2 == 0 else round(math.exp(random.uniform() * left)) for i in range(self.num_sets)]
        if policy is not None:
            ahead, _ = policy.picks(policy.static(images), visible)
        for i, more in enumerate(added):
            if policy is not None and i % 2:
                extra = ahead[:, :more]
            else:
                extra = (random.rand(b, n) + 2.0 * visible).argsort(1)[:, :more]
            index = torch.cat([order[:, :start], extra], 1)
            sets.append(visible.scatter(1, extra, True))
            errors.append(self.reconstructor.errors(tokens, index, grid))
        return visible, torch.stack(sets, 1), torch.stack(errors, 1)
