"""In which order a generator fills its grid of tokens, and how many tokens at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from .augment import mix_random
from .bank import ClassOrderBank, check_labels, check_source, draw_uniform, jittered
from .baselines import baseline_scores
from .errors import CollapseError, check_grid, describe
from .order import Order

_FIXED = ("random", "raster", "centre", "halton", "bayer")
_FROM_BANK = ("collapse", "collapse_reversed")
GENERATION_ORDERS = (*_FIXED, *_FROM_BANK, "confidence")


def tokens_per_step(num_tokens: int, steps: int) -> list[int]:
    """MAR's cosine plan: few tokens in the first steps, where little is known, many in the last ones.

    After step s of T, min(left - 1, floor(L cos(pi/2 (s + 1) / T))) tokens are left to generate, at least 1; the last
    step takes all of them.

    Args:
        num_tokens: L, at least 1.
        steps: T, in [1, L].

    Returns:
        T counts, each at least 1, that sum to L.

    Raises:
        CollapseError: For numbers that are no ints or out of range.

    Source: Li et al., "Autoregressive Image Generation without Vector Quantization", NeurIPS 2024.
    """
    if not _is_int(num_tokens) or num_tokens < 1:
        raise CollapseError(f"num_tokens must be an int of at least 1, got {num_tokens!r}")
    if not _is_int(steps) or not 1 <= steps <= num_tokens:
        raise CollapseError(f"steps must be an int in [1, {num_tokens}] (one token a step at least), got {steps!r}")
    plan, left = [], int(num_tokens)
    for step in range(steps - 1):
        # numpy and this sequence of operations: the reference's rounding decides where L cos() is a whole number
        masked = int(np.floor(num_tokens * np.cos(math.pi / 2.0 * (step + 1) / steps)))
        masked = max(1, min(left - 1, masked))
        plan.append(left - masked)
        left = masked
    return [*plan, left]


class GenerationOrder:
    """Gives each sample its order, best first, and the plan of tokens per step.

    Args:
        order: One of GENERATION_ORDERS; a `ClassOrderBank`, which means "collapse" from it; an `Order` or a long
            tensor (B, L) of token numbers, first to last, one for each sample or one for all.
            "collapse" draws from the bank by class, "collapse_reversed" the same from the end; "confidence" is chosen
            by the sampler while it samples, and only named here.
        grid: Rows and columns of tokens (h, w), L = h * w.
        bank: For "collapse" and "collapse_reversed"; the others do not use it.
        source: What to take from the bank: "bank", a real order of the class, or "mean", the mean one.
        temperature: Plackett-Luce noise around the order, at least 0, see `jitter_order`.
        random_share: Expected share of the samples, in [0, 1], that get a random order instead.

    Attributes:
        name: One of GENERATION_ORDERS, or "given".
        dynamic: True where the sampler chooses.

    Raises:
        CollapseError: For an unknown name, a missing or second bank, another grid, a row that is no permutation, or
            numbers out of range; for temperature or random_share with "confidence", which has no order to change.
    """

    def __init__(
        self,
        order: str | ClassOrderBank | Order | Tensor,
        grid: Sequence[int],
        bank: ClassOrderBank | None = None,
        source: str = "bank",
        temperature: float = 0.0,
        random_share: float = 0.0,
    ):
        self.grid = check_grid(grid)
        check_source(source)
        if not isinstance(temperature, Real) or not temperature >= 0:
            raise CollapseError(f"temperature must be a number of at least 0, got {temperature!r}")
        if not isinstance(random_share, Real) or not 0 <= random_share <= 1:
            raise CollapseError(f"random_share must be a number in [0, 1], got {random_share!r}")
        self.source, self.temperature, self.random_share = source, temperature, random_share
        if isinstance(order, ClassOrderBank):
            if bank is not None:
                raise CollapseError("bank must be None where order is a ClassOrderBank itself, got a second one")
            order, bank = "collapse", order
        self.name, self._given, self._bank = order if isinstance(order, str) else "given", None, None
        if self.name in _FROM_BANK:
            self._bank = self._check_bank(bank)
        elif not isinstance(order, str):
            self._given = self._check_given(order)
        elif order not in GENERATION_ORDERS:
            raise CollapseError(
                f"order must be one of {', '.join(GENERATION_ORDERS)}, a ClassOrderBank, an Order or a long tensor of "
                f"shape (B, {self.num_tokens}), got {order!r}"
            )
        if self.dynamic and (temperature or random_share):
            raise CollapseError(
                f"temperature and random_share must be 0 for the order 'confidence', which the sampler chooses, got "
                f"{temperature!r} and {random_share!r}"
            )

    @property
    def dynamic(self) -> bool:
        """Whether the sampler chooses the order while it samples."""
        return self.name == "confidence"

    @property
    def num_tokens(self) -> int:
        """L = h * w."""
        return self.grid[0] * self.grid[1]

    def plan(self, steps: int) -> list[int]:
        """How many tokens each step generates, see `tokens_per_step`."""
        return tokens_per_step(self.num_tokens, steps)

    def __call__(self, labels: Tensor | None, generator: torch.Generator | None = None) -> Order:
        """The orders of a batch.

        Args:
            labels: (B,) of an integer type, on any device; only the bank uses their values. None (no classes): one.
            generator: The only source of randomness, on any device; torch's own by default.

        Returns:
            B orders, on the device of the labels.

        Raises:
            CollapseError: For other labels, labels that the bank does not have, another number of given orders, or
                where the sampler chooses.
        """
        if self.dynamic:
            raise CollapseError("order 'confidence' is chosen by the sampler while it samples, got a call for it")
        batch, device = len(check_labels(labels)), "cpu" if labels is None else labels.device
        if self._bank is not None:
            order = self._bank.sample(labels, generator, self.source, self.temperature)
        elif self._given is not None:
            if len(self._given) not in (1, batch):
                raise CollapseError(f"order must be one for all or one a label, got {len(self._given)} for {batch}")
            order = self._given if len(self._given) == batch else self._given[torch.zeros(batch, dtype=torch.long)]
        else:
            shape_only = torch.zeros(batch, 3, 1, 1, device=device)
            order = Order(baseline_scores(self.name, shape_only, self.grid, generator), self.grid)
        if self._bank is None:
            order = jittered(order.to(device), self.temperature, generator)
        if self.random_share == 0:
            return order
        uniform = draw_uniform((batch, self.num_tokens + 1), generator, device)
        return mix_random(order, self.random_share, uniform)

    def _check_given(self, order: Order | Tensor) -> Order:
        allowed = f"an Order on the grid {self.grid} or a best-first long tensor of shape (B, {self.num_tokens})"
        if isinstance(order, Order):
            if order.grid != self.grid or not len(order):
                raise CollapseError(f"order must be {allowed}, got {order!r}; see Order.resample")
            return order
        if not isinstance(order, Tensor) or order.ndim != 2 or order.shape[1] != self.num_tokens or not len(order):
            raise CollapseError(f"order must be {allowed}, or one of {', '.join(GENERATION_ORDERS)}, "
                                f"got {describe(order)}")  # fmt: skip
        try:
            return Order.from_indices(order, self.grid)
        except CollapseError as error:
            raise CollapseError(f"order must be {allowed}: {error}") from error

    def _check_bank(self, bank: ClassOrderBank | None) -> ClassOrderBank:
        if not isinstance(bank, ClassOrderBank):
            raise CollapseError(f"bank must be a ClassOrderBank for the order {self.name!r}, got {describe(bank)}")
        if bank.grid != self.grid:
            raise CollapseError(
                f"bank must be on the grid {self.grid} of the tokens, got {bank.grid}; see ClassOrderBank.resample"
            )
        return bank.reversed() if self.name == "collapse_reversed" else bank

    def __repr__(self) -> str:
        source = f", source={self.source!r}" if self._bank is not None else ""
        noise = f", temperature={self.temperature}, random_share={self.random_share}"
        return f"GenerationOrder({self.name!r}, {self.grid[0]}x{self.grid[1]} tokens{source}{noise})"


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
