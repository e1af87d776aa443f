"""Order: the order of the patches of a batch of images, the one currency between orderers and their users."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import resolve_keep
from .errors import CollapseError, check_grid, describe, values_readable
from .resampling import check_spread, refined_ranks
from .sorting import inverted, stable_argsort
from .spread import bayer_ranks


class Order:
    """The order of the patches of a batch of images; immutable.

    Patches are numbered row by row: patch n is at row n // w, column n % w of the grid (h, w). Patches with equal
    scores are ordered by their number. `indices` and `ranks` are computed when first asked for, then kept, so do not
    change the scores in place. Copies and pickles hold the scores without their autograd graph.

    Args:
        scores: (B, N) floating point of any precision, higher = earlier; infinite values are allowed, NaN is not.
        grid: Rows and columns of patches (h, w), h * w = N.

    Raises:
        CollapseError: For scores of another shape or dtype, with NaN, or that do not fill the grid.
    """

    __slots__ = ("_scores", "_grid", "_indices", "_ranks")

    def __init__(self, scores: Tensor, grid: Sequence[int]):
        if not isinstance(scores, Tensor) or scores.ndim != 2 or not scores.is_floating_point():
            raise CollapseError(f"scores must be a float tensor of shape (B, N), got {describe(scores)}")
        self._grid = check_grid(grid, num_patches=scores.shape[1])
        if values_readable(scores) and scores.isnan().any():
            bad = int(scores.isnan().any(dim=1).nonzero()[0])
            raise CollapseError(f"scores must not be NaN, got NaN in row {bad}")
        self._scores = scores
        self._indices: Tensor | None = None
        self._ranks: Tensor | None = None

    @classmethod
    def unchecked(cls, scores: Tensor, grid: tuple[int, int]) -> Order:
        """As the constructor, of scores (B, h * w) known to be right: no value is read back from a GPU."""
        order = object.__new__(cls)
        order._scores, order._grid = scores, tuple(grid)
        order._indices = order._ranks = None
        return order

    @classmethod
    def from_indices(cls, indices: Tensor, grid: Sequence[int]) -> Order:
        """An order from the patches listed best first.

        Args:
            indices: (B, N) long, every row a permutation of 0..N-1.
            grid: Rows and columns of patches (h, w), h * w = N.

        Returns:
            The order; its scores are (N - rank) / N, in (0, 1].

        Raises:
            CollapseError: Where a row is no permutation, or the grid does not fit.
        """
        grid = _check_permutations("indices", indices, grid)
        return cls._from_permutations(grid, indices, inverted(indices))

    @classmethod
    def from_ranks(cls, ranks: Tensor, grid: Sequence[int]) -> Order:
        """An order from the rank of every patch; as `from_indices`, with ranks (B, N) long, 0 = first."""
        grid = _check_permutations("ranks", ranks, grid)
        return cls._from_permutations(grid, inverted(ranks), ranks)

    @classmethod
    def with_spread_ties(cls, scores: Tensor, grid: Sequence[int]) -> Order:
        """An order from scores (B, N) of which many are equal: those come coarse to fine (Bayer), not row by row.

        Scores within 2^-20 of the largest of an image count as equal.

        Raises:
            CollapseError: As the constructor; for infinite values, too.
        """
        grid = cls(scores, grid).grid
        if values_readable(scores) and not scores.isfinite().all():
            raise CollapseError("scores must be finite, got infinite ones")
        largest = scores.abs().amax(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        return cls._coarse_to_fine((scores.double() / largest * -(2**20)).round(), grid, bayer_ranks(grid))

    @classmethod
    def _from_permutations(cls, grid: tuple[int, int], indices: Tensor, ranks: Tensor) -> Order:
        num_patches = ranks.shape[1]
        order = cls.unchecked((num_patches - ranks).float() / num_patches, grid)
        order._indices, order._ranks = indices, ranks
        return order

    @classmethod
    def _coarse_to_fine(cls, values: Tensor, grid: tuple[int, int], bayer: Tensor) -> Order:
        """By ascending values (B, N); equal ones come by their Bayer ranks (N,)."""
        # a stable sort of patches that are already laid out coarse to fine breaks the ties coarse to fine
        layout = bayer.argsort().to(values.device)
        indices = layout[stable_argsort(values[:, layout])]
        return cls._from_permutations(grid, indices, inverted(indices))

    @staticmethod
    def cat(orders: Sequence[Order]) -> Order:
        """The orders of several batches as one batch.

        Raises:
            CollapseError: Where there are none, or their grids or devices differ.
        """
        orders = list(orders)
        grids = sorted({order.grid for order in orders})
        if len(grids) != 1:
            raise CollapseError(f"orders must be at least one Order and share one grid, got the grids {grids}")
        devices = sorted({str(order.scores.device) for order in orders})
        if len(devices) != 1:
            raise CollapseError(f"orders must be on one device, got {devices}; see Order.to")
        return Order.unchecked(torch.cat([order.scores for order in orders]), grids[0])

    @property
    def scores(self) -> Tensor:
        """(B, N) float, higher = earlier."""
        return self._scores

    @property
    def indices(self) -> Tensor:
        """(B, N) long: the numbers of the patches, best first."""
        indices = self._indices
        if indices is None:
            indices = stable_argsort(self._scores.detach(), descending=True)
            if self._keeps(indices):
                self._indices = indices
        return indices

    @property
    def ranks(self) -> Tensor:
        """(B, N) long: the rank of every patch, 0 = first."""
        ranks = self._ranks
        if ranks is None:
            ranks = inverted(self.indices)
            if self._keeps(ranks):
                self._ranks = ranks
        return ranks

    def _keeps(self, computed: Tensor) -> bool:
        """Not what stands for a tensor while a pass is exported or traced: it belongs to that pass alone."""
        return type(self._scores) in (type(computed), torch.nn.Parameter) and not torch.jit.is_tracing()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches (h, w)."""
        return self._grid

    @property
    def num_patches(self) -> int:
        """N = h * w."""
        return self._grid[0] * self._grid[1]

    def __len__(self) -> int:
        return self._scores.shape[0]

    def __getitem__(self, item: int | slice | Sequence | Tensor) -> Order:
        """The orders of some images, by their places in the batch.

        Args:
            item: As torch indexes a first axis: an int (which keeps the batch dimension here), a slice, the numbers of
                images (k,) or a mask (B,) of bools, as a tensor, an array or a list.

        Raises:
            IndexError: There is no such image.
            CollapseError: For anything else, such as a second axis.
        """
        rows = _rows(item, len(self), self._scores.device)
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Order:
        """The same order on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function) -> Order:
        order = Order.unchecked(self._scores, self._grid)
        for name in ("_scores", "_indices", "_ranks"):
            tensor = getattr(self, name)
            setattr(order, name, None if tensor is None else function(tensor))
        return order

    def __reduce__(self):
        return Order, (self._scores.detach(), self._grid)

    def __deepcopy__(self, memo: dict) -> Order:
        return Order(self._scores.detach().clone(), self._grid)

    def __repr__(self) -> str:
        height, width = self._grid
        return f"Order({len(self)} images, {height}x{width} patches, {self._scores.device})"

    def keep(self, keep: float | int) -> Tensor:
        """The patches that are kept.

        Args:
            keep: A ratio in (0, 1] or an int count in [2, N]; 1 means all, see `resolve_keep`.

        Returns:
            (B, k) long: the numbers of the k best patches, sorted by position, not by rank.

        Raises:
            CollapseError: For a keep out of range.
        """
        return self.first(resolve_keep(keep, self.num_patches))

    def first(self, count: int) -> Tensor:
        """(B, count) long: the numbers of the `count` best patches, in [0, N], sorted by position; 1 is one patch."""
        return self.indices[:, :count].sort(dim=1).values

    def mask(self, keep: float | int) -> Tensor:
        """The patches that are kept, as (B, N) bool, True = kept; otherwise as `keep`."""
        return self.ranks < resolve_keep(keep, self.num_patches)

    def reversed(self) -> Order:
        """The opposite order, exactly: last becomes first, also among patches with equal scores."""
        return Order._from_permutations(self._grid, self.indices.flip(1), self.num_patches - 1 - self.ranks)

    def resample(self, grid: Sequence[int], spread: float = 0.0) -> Order:
        """The order on a finer or coarser grid of the same images.

        A finer grid: a patch belongs to the old patch that its centre lies in; patches come in the order of their old
        patches, and inside one old patch coarse to fine (Bayer), so that equal ratios keep equal areas. Parts of one
        old patch tell much the same, so `spread` trades the old order for covering more of the image: patches come in
        the order of (1 - spread) rank / old N + spread place / parts, the place being that inside the old patch. A
        coarser grid: by the mean of the ranks that a patch covers (the window is widened to whole old patches), ties
        coarse to fine. Finer along one axis and coarser along the other: first the coarser axis, then the finer one.

        Args:
            grid: The new rows and columns (h, w).
            spread: In [0, 1], for a finer grid; 1: one part of every old patch before the second of any.

        Returns:
            The order on that grid, with scores (N - rank) / N and no gradient; the same object for the same grid.

        Raises:
            CollapseError: For a wrong grid or spread.
        """
        grid = check_grid(grid)
        check_spread(spread)
        if grid == self._grid:
            return self
        shared = (min(grid[0], self._grid[0]), min(grid[1], self._grid[1]))
        if shared not in (grid, self._grid):
            return self.resample(shared).resample(grid, spread)

        bayer = bayer_ranks(grid)
        if shared == grid:
            values = F.adaptive_avg_pool2d(self.ranks.unflatten(1, self._grid).unsqueeze(1).float(), grid).flatten(1)
        else:
            values = refined_ranks(self.ranks, self._grid, grid, bayer, spread)
        return Order._coarse_to_fine(values, grid, bayer)


def _rows(item: int | slice | Sequence | Tensor, batch: int, device: torch.device) -> slice | Tensor:
    """What indexes the first axis of a tensor of `batch` rows, see `Order.__getitem__`."""
    if isinstance(item, slice) and (item.step is None or item.step > 0):
        return item
    if isinstance(item, Integral) and not isinstance(item, bool):
        row = range(batch)[item]
        return slice(row, row + 1)
    if isinstance(item, (Tensor, np.ndarray, list, range)):
        empty = isinstance(item, (list, range)) and not item
        rows = torch.empty(0, dtype=torch.long, device=device) if empty else torch.as_tensor(item, device=device)
        if rows.dtype == torch.bool:
            if rows.shape == (batch,):
                return rows
        elif rows.ndim <= 1 and not rows.is_floating_point() and not rows.is_complex():
            return rows.long().reshape(-1)
    raise CollapseError(
        f"an Order of {batch} images must be indexed along the batch alone, by an int, a slice that ascends, numbers "
        f"(k,) or a mask ({batch},) of bools, got {describe(item)}"
    )


def _check_permutations(name: str, rows: Tensor, grid: Sequence[int]) -> tuple[int, int]:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.dtype != torch.long:
        raise CollapseError(f"{name} must be a long tensor of shape (B, N), got {describe(rows)}")
    grid = check_grid(grid, num_patches=rows.shape[1])
    if values_readable(rows):
        wrong = (rows.sort(dim=1).values != torch.arange(rows.shape[1], device=rows.device)).any(dim=1)
        if wrong.any():
            bad = int(wrong.nonzero()[0])
            raise CollapseError(
                f"{name} must hold each of 0..{rows.shape[1] - 1} once in every row, got {rows[bad].tolist()[:16]}"
                f"{'...' if rows.shape[1] > 16 else ''} in row {bad}"
            )
    return grid
