"""ClassOrderBank: when an image is generated there is none to order yet, so its order is taken from training images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .augment import jitter_order
from .errors import CollapseError, check_grid, describe
from .order import Order

SOURCES = ("bank", "mean")
FORMAT, VERSION = "timm-collapse class order bank", "1"


class ClassOrderBank:
    """Orders of training images by class: a sample of real ones, and the mean of all.

    Args:
        ranks: (C, K, N), 0 = first; uint8 for N <= 256, else int32: up to K orders of each of C classes. A class with
            fewer orders fills its first places, what is behind them is never read.
        means: (C, N) float32: the mean of (N - rank) / N over all orders of a class, held or not, in (0, 1];
            0 for a class without orders.
        seen: (C,) long: how many orders of a class the means are of; the first min(seen, K) of `ranks` are held.
        grid: Rows and columns of patches (h, w), h * w = N.
        source: What the orders are of and who made them, for people.

    Raises:
        CollapseError: Where shapes, dtypes or values are none of these, or no class has an order.
    """

    def __init__(self, ranks: Tensor, means: Tensor, seen: Tensor, grid: Sequence[int], source: str = ""):
        self.grid = check_grid(grid)
        self.ranks, self.means, self.seen, self.source = ranks, means, seen, str(source)
        n = self.num_patches
        if ranks.ndim != 3 or 0 in ranks.shape or ranks.shape[2] != n or ranks.dtype != _rank_dtype(n):
            raise CollapseError(f"ranks must be {_rank_dtype(n)} of shape (C, K, {n}), got {describe(ranks)}")
        if means.shape != (len(ranks), n) or means.dtype != torch.float32 or not means.isfinite().all():
            raise CollapseError(f"means must be finite float32 of shape ({len(ranks)}, {n}), got {describe(means)}")
        if seen.shape != (len(ranks),) or seen.dtype != torch.long or seen.min() < 0 or not seen.any():
            raise CollapseError(f"seen must be ({len(ranks)},) long, at least 0, not all 0, got {describe(seen)}")
        for label, count in enumerate(self.counts.tolist()):
            held = ranks[label, :count].long()
            found = torch.zeros(held.shape, dtype=torch.bool)
            if (held < 0).any() or (held >= n).any() or not found.scatter_(1, held, True).all():
                raise CollapseError(f"ranks must hold each of 0..{n - 1} once in every row, not so in class {label}")

    @classmethod
    def build(
        cls,
        orders: Iterable[tuple[Order, Tensor | None]],
        num_classes: int,
        per_class: int = 128,
        seed: int = 0,
        source: str = "",
    ) -> ClassOrderBank:
        """Sample the orders of a data set, in one pass.

        Args:
            orders: Batches of orders, all on one grid, with their labels (B,) of an integer type, in
                [0, num_classes); labels None: all are of class 0.
            num_classes: Classes C, at least 1.
            per_class: Real orders to hold of each class (a reservoir sample: each is equally likely), at least 1.
            seed: Of the sample, at least 0. The bank depends on the sequence of orders, not on its batches.
            source: See the class.

        Raises:
            CollapseError: No orders, different grids, or a label or number out of range.
        """
        for name, value, low in (("num_classes", num_classes, 1), ("per_class", per_class, 1), ("seed", seed, 0)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise CollapseError(f"{name} must be an int of at least {low}, got {value!r}")
        rng, grid, seen = np.random.default_rng(seed), None, [0] * num_classes
        for order, labels in orders:
            labels = torch.zeros(len(order), dtype=torch.long) if labels is None else check_labels(labels, num_classes)
            if len(labels) != len(order):
                raise CollapseError(f"labels must be one an order, got {len(labels)} for {len(order)} orders")
            if grid is None:
                grid, dtype = order.grid, _rank_dtype(order.num_patches)
                held = torch.zeros(num_classes, per_class, order.num_patches, dtype=dtype).numpy()
                sums = torch.zeros(num_classes, order.num_patches, dtype=torch.long)
            elif order.grid != grid:
                raise CollapseError(f"orders must share one grid, got {grid} and {order.grid}")
            ranks = order.ranks.cpu()
            sums.index_add_(0, labels.cpu(), ranks)
            rows = zip(ranks.to(dtype).numpy(), labels.tolist(), rng.random(len(order)), strict=True)
            for row, label, uniform in rows:
                place = seen[label] if seen[label] < per_class else int(uniform * (seen[label] + 1))
                if place < per_class:
                    held[label, place] = row
                seen[label] += 1
        if grid is None:
            raise CollapseError("orders must hold at least one batch, got none")
        counts, n = torch.tensor(seen), sums.shape[1]
        means = (1 - sums.double() / counts.clamp_min(1)[:, None] / n) * (counts > 0)[:, None]
        used = min(per_class, max(seen))
        return cls(torch.from_numpy(held[:, :used].copy()), means.float(), counts, grid, source)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.ranks.shape[0]

    @property
    def num_patches(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def counts(self) -> Tensor:
        """(C,) long: how many real orders are held of each class."""
        return self.seen.clamp(max=self.ranks.shape[1])

    def sample(
        self,
        labels: Tensor | None,
        generator: torch.Generator | None = None,
        source: str = "bank",
        temperature: float = 0.0,
    ) -> Order:
        """Draw an order for each label.

        Args:
            labels: (B,) of an integer type, in [0, C), on any device; None, for a bank of one class: one order.
            generator: The source of randomness, on any device; torch's own by default.
            source: "bank": a real order of the class, each equally likely; "mean": the mean order of the class.
            temperature: Plackett-Luce noise around that order, see `jitter_order`; 0 for none.

        Returns:
            B orders, on the device of the labels.

        Raises:
            CollapseError: An unknown source, a negative temperature, a label out of range or without orders.
        """
        check_source(source)
        if labels is None and self.num_classes != 1:
            raise CollapseError(f"labels may be None only for a bank of one class, this one has {self.num_classes}")
        labels = check_labels(labels, self.num_classes)
        index = labels.cpu()
        counts = self.counts[index]
        if (counts == 0).any():
            empty = index[counts == 0].unique().tolist()
            raise CollapseError(f"labels: the bank has no orders of the classes {empty[:8]}, only of those with images")
        if source == "mean":
            order = Order(self.means[index], self.grid)
        else:
            uniform = draw_uniform((len(index),), generator, labels.device).cpu()
            places = (uniform.double() * counts).long()
            order = Order.from_ranks(self.ranks[index, places].long(), self.grid)
        return jittered(order.to(labels.device), temperature, generator)

    def shuffled(self, seed: int) -> ClassOrderBank:
        """A control: every class gets the orders of another one. What an order knows of its class is lost.

        Args:
            seed: Of the permutation, one random cycle, so that no class keeps its own. Classes without orders stay so.

        Raises:
            CollapseError: Fewer than two classes have orders.
        """
        filled = self.seen.nonzero().flatten()
        if len(filled) < 2:
            raise CollapseError(f"bank must have orders of at least two classes to shuffle, got {len(filled)}")
        cycle = filled[torch.randperm(len(filled), generator=torch.Generator().manual_seed(seed))]
        origin = torch.arange(self.num_classes)
        origin[cycle] = cycle.roll(1)
        source = f"{self.source}, classes shuffled with seed {seed}"
        return ClassOrderBank(self.ranks[origin], self.means[origin], self.seen[origin], self.grid, source)

    def reversed(self) -> ClassOrderBank:
        """A control: every order from its end."""
        n = self.num_patches
        means = ((n + 1) / n - self.means.double()).float() * (self.seen > 0)[:, None]
        ranks = (n - 1 - self.ranks.int()).to(self.ranks.dtype)
        return ClassOrderBank(ranks, means, self.seen, self.grid, f"{self.source}, reversed")

    def resample(self, grid: Sequence[int]) -> ClassOrderBank:
        """The bank on a finer or coarser grid, see `Order.resample`; the same object for the same grid.

        The means become the scores of the resampled mean orders.
        """
        grid = check_grid(grid)
        if grid == self.grid:
            return self
        n = grid[0] * grid[1]
        ranks = torch.zeros(*self.ranks.shape[:2], n, dtype=_rank_dtype(n))
        for label, count in enumerate(self.counts.tolist()):
            if count:
                order = Order.from_ranks(self.ranks[label, :count].long(), self.grid)
                ranks[label, :count] = order.resample(grid).ranks.to(ranks.dtype)
        means = Order(self.means, self.grid).resample(grid).scores * (self.seen > 0)[:, None]
        return ClassOrderBank(ranks, means, self.seen, grid, self.source)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in ("ranks", "means", "seen")}
        grid = f"{self.grid[0]} {self.grid[1]}"
        save_file(tensors, path, metadata={"format": FORMAT, "version": VERSION, "grid": grid, "source": self.source})

    @classmethod
    def load(cls, path: str | Path) -> ClassOrderBank:
        """Read a file that `save` wrote.

        Raises:
            CollapseError: It is something else, damaged, or of a later version.
            OSError: It cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CollapseError(f"path: {path} must be a bank that ClassOrderBank.save wrote, it is not")
                if metadata.get("version") != VERSION:
                    raise CollapseError(
                        f"path: {path} has format version {metadata.get('version')!r}, this package reads {VERSION!r}"
                    )
                tensors = [file.get_tensor(name) for name in ("ranks", "means", "seen")]
                grid = tuple(int(side) for side in metadata["grid"].split())
            return cls(*tensors, grid, metadata["source"])
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, CollapseError) and str(error).startswith("path: "):
                raise
            raise CollapseError(f"path: {path} is no class order bank, or damaged: {error}") from error

    def __repr__(self) -> str:
        height, width = self.grid
        return (
            f"ClassOrderBank({self.num_classes} classes, up to {self.ranks.shape[1]} orders each, "
            f"{height}x{width} patches, {self.source!r})"
        )


def check_labels(labels: Tensor | None, num_classes: int | None = None) -> Tensor:
    """Labels as long (B,); None stands for one label 0.

    Raises:
        CollapseError: Another shape or dtype, none at all, or one outside of [0, num_classes), where that is given.
    """
    if labels is None:
        return torch.zeros(1, dtype=torch.long)
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not integers or labels.dtype == torch.bool or labels.ndim != 1 or not len(labels):
        raise CollapseError(f"labels must be a long tensor of shape (B,), B at least 1, got {describe(labels)}")
    labels = labels.long()
    if num_classes is not None:
        wrong = (labels < 0) | (labels >= num_classes)
        if wrong.any():
            bad = int(wrong.nonzero()[0])
            raise CollapseError(f"labels must be in [0, {num_classes - 1}], got {int(labels[bad])} at index {bad}")
    return labels


def check_source(source: str) -> None:
    """Raises CollapseError unless source is one of SOURCES."""
    if source not in SOURCES:
        raise CollapseError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")


def draw_uniform(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniform in [0, 1): drawn on the generator's device, or on `device` without one; returned on `device`."""
    return torch.rand(shape, generator=generator, device=device if generator is None else generator.device).to(device)


def jittered(order: Order, temperature: float, generator: torch.Generator | None) -> Order:
    """`jitter_order` with the randomness of a generator; draws none at temperature 0."""
    if temperature == 0:
        return order
    return jitter_order(order, temperature, draw_uniform(order.scores.shape, generator, order.scores.device))


def _rank_dtype(num_patches: int) -> torch.dtype:
    return torch.uint8 if num_patches <= 256 else torch.int32
