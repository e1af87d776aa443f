"""The collapsed model: what every family of image models shares, from its settings to the patches that are kept.

A model is collapsed in place by `collapse`: its `__class__` becomes a subclass of its own class, so parameter names,
`isinstance` and every method stay, and the forward pass sees fewer tokens.
"""

from __future__ import annotations

from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from ..models.normalisation import Normalisation
from ..order import CollapseError, Order, resolve_keep
from ..order.errors import describe
from .holder import HoldsOrderer
from .remainder import DEFAULT_REMAINDER, REMAINDERS, Plan, plan_remainder
from .selection import Carrier, Selection, fit_images


class Collapsed(HoldsOrderer):
    """Mixin of every collapsed model; subclasses say where their tokens are.

    Attributes:
        orderer: `CollapseOrder`, see `HoldsOrderer`.
        keep: Token budget of the patches, a ratio in (0, 1] or a count; may be changed at any time. The remainder's
            tokens are part of the budget. 1 runs the plain model, bit for bit, and computes no order.
        remainder: What becomes of the dropped patches: "none", "fused" (one token: the mean of their embeddings),
            "coarse" (the whole image at low resolution as a few patches), "mixed" (mixed resolution: the image is
            covered once, by patches where the order comes early and by ever larger cells, one token each, elsewhere),
            "split" (the same in two sizes, on any grid: the image is downscaled, and where the order comes early each
            token is split in four), or "zoom" (the image is downscaled on a grid whose rows and columns are narrow
            where the order comes early).
        coarse_share: Share of the budget that coarse tokens may take; 1: the image is only downscaled. For "mixed" and
            "split", the share that the largest cells have before any of them is split; for "zoom", that of the rows
            and columns that lie evenly.
        area_bias: A token that stands for m patches (of the remainder; a kept patch is 1) gets area_bias x log(m) added
            to its attention logits as a key, in every block, and where patches are pooled; at least 0. At 1 it counts
            as m tokens would; 0: as one. Which is best for weights that saw no such tokens is between, see
            docs/results.md.
        size_embed: Parameter (2, D), or None. With it, size_embed[0] + log(m) size_embed[1] is added to each token of
            the remainder, of m patches: what tells the blocks how large a token's cell is. It starts at zero, as what
            is added to large patches in APT (arXiv 2510.18091), and is learned, see docs/adapt.md.
    """

    # -- set-up ------------------------------------------------------------------------------------------------------

    def set_up(
        self,
        orderer: nn.Module,
        keep: float | int,
        remainder: str,
        coarse_share: float,
        area_bias: float,
        normalisation: Normalisation,
        size_embed: bool | None = None,
    ) -> None:
        """Take the settings of a collapse, all of them checked, and put the parts that drop tokens in their places."""
        if size_embed is not None or not hasattr(self, "size_embed"):
            self.make_size_embed(bool(size_embed))
        self.remainder, self.coarse_share, self.area_bias = remainder, coarse_share, area_bias
        self.carrier = Carrier()
        self.hold(orderer)
        self.normalisation = normalisation
        self.keep = keep
        self._attach()

    def _attach(self) -> None:
        """Put the parts that see the selection in their places."""
        raise NotImplementedError

    @property
    def remainder(self) -> str:
        return self._remainder

    @remainder.setter
    def remainder(self, remainder: str) -> None:
        check_remainder(remainder, self.why_no_remainder())
        self._remainder = remainder
        self.record(remainder=remainder)

    @property
    def coarse_share(self) -> float:
        return float(self._coarse_share)  # text, as `keep`

    @coarse_share.setter
    def coarse_share(self, coarse_share: float) -> None:
        self._coarse_share = repr(check_share(coarse_share))
        self.record(coarse_share=self.coarse_share)

    @property
    def area_bias(self) -> float:
        return float(self._area_bias)  # text, as `keep`

    @area_bias.setter
    def area_bias(self, area_bias: float) -> None:
        self._area_bias = repr(check_area_bias(area_bias, self.why_no_area_bias(self)))
        self.record(area_bias=self.area_bias)

    def make_size_embed(self, wanted: bool) -> None:
        """Have a size embedding, the one that is there or a new one, which is zero; or none.

        Raises:
            CollapseError: One is wanted, and the model cannot have it.
        """
        check_size_embed(wanted, self.why_no_size_embed(self))
        if wanted and getattr(self, "size_embed", None) is not None:
            return
        like = next(self.parameters())
        zeros = torch.zeros(2, self.embed_dim, device=like.device, dtype=like.dtype) if wanted else None
        self.register_parameter("size_embed", None if zeros is None else nn.Parameter(zeros))
        self.record(size_embed=wanted)

    def why_no_remainder(self) -> str:
        """Why no token can stand for the dropped patches; empty where one can. Of a plain model, too."""
        stem = hasattr(getattr(self, "patch_embed", None), "backbone")
        return "the model's convolutional stem embeds whole images only" if stem else ""

    @classmethod
    def why_no_area_bias(cls, model: nn.Module) -> str:
        """Why no token of a model, plain or collapsed, can count for its area; empty where it can."""
        return cls.why_no_remainder(model)

    @classmethod
    def why_no_size_embed(cls, model: nn.Module) -> str:
        """Why a model, plain or collapsed, cannot have a size embedding; empty where it can."""
        return cls.why_no_remainder(model)

    # -- selection ---------------------------------------------------------------------------------------------------

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        """Patch grid (h, w) of a batch of images; raises CollapseError for a size that the model does not take."""
        raise NotImplementedError

    def _patch_size(self) -> tuple[int, int]:
        raise NotImplementedError

    def _embed_patches(self, images: Tensor) -> Tensor:
        """(B, C, h p, w q) -> (B, h w, D), without position embedding, of images of any size."""
        raise NotImplementedError

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, N, D): what is added to the patch embeddings of a grid; None: nothing is."""
        raise NotImplementedError

    def compute_order(
        self,
        images: Tensor,
        upto: int | None = None,
        grid: tuple[int, int] | None = None,
        weights: Tensor | None = None,
    ) -> Order:
        """The order of the patches of images (B, C, H, W) in this model's normalisation, on its own grid or another.

        Args:
            images: As the model gets them.
            upto: Only so many first places are needed, see `CollapseOrder`.
            grid: Patch grid (h, w) of the result; None takes the model's for these images.
            weights: By how much the uncertainty of each patch counts, see `CollapseOrder`.

        Raises:
            CollapseError: As `CollapseOrder.forward`; images of another size than the model's.
        """
        own = self.image_grid(images)
        return self._order(fit_images(images, own, self._patch_size()), grid or own, upto, True, weights)

    @torch.no_grad()
    def _order(
        self,
        images: Tensor,
        grid: tuple[int, int],
        upto: int | None,
        check: bool = False,
        weights: Tensor | None = None,
    ) -> Order:
        """The order of fitted images; without `check` no value is read back from a GPU."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        images = self.normalisation.to(Normalisation.of(self.orderer), images)
        return self.orderer_on(images.device)(images, grid=grid, upto=upto, check=check, weights=weights)

    def select(self, images: Tensor, order: Order | None = None) -> Selection | None:
        """What becomes of the patches of a batch of images, decided once a forward pass.

        Args:
            images: (B, C, H, W), as the model gets them.
            order: Of their patches; None asks the orderer, where one is needed.

        Returns:
            The selection, for the parts of the model; None where all patches are kept.

        Raises:
            CollapseError: An order of another batch or grid, images of another size, or a budget that they do not have.
        """
        keep = self.keep
        if keep == 1 and order is None:
            return None
        grid, patch_size = self.image_grid(images), self._patch_size()
        if order is not None:
            check_order(order, images.shape[0], grid)
        budget = resolve_keep(keep, grid[0] * grid[1])
        if budget == grid[0] * grid[1]:
            return None
        plan = self.plan(budget, grid)
        images = fit_images(images, grid, patch_size)
        if plan.places == 0:
            order = None
        elif order is None:
            order = self._order(images, grid, plan.places)
        else:
            order = order.to(images.device)
        selection = plan.select(order, images, self._embed_patches, partial(self._patch_positions, grid))
        if selection.areas is None:
            return selection
        if self.size_embed is not None:
            selection = selection.sized(self.size_embed)
        return selection.biased(self.area_bias, self.num_prefix_tokens) if self.area_bias else selection

    def plan(self, budget: int, grid: tuple[int, int]) -> Plan:
        """What the tokens of a budget are, on a grid of patches (h, w)."""
        return plan_remainder(self.remainder, budget, grid, self._patch_size(), self.coarse_share)

    # -- nn.Module ---------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        # not the layers of the orderer's network: they are none of the model's
        orderer = f"{type(self.orderer).__name__}({self.orderer.extra_repr()})"
        return f"keep={self.keep}, remainder={self.remainder!r}, orderer={orderer}"


def default_remainder(
    remainder: str | None, area_bias: float | None, why_no_remainder: str, why_no_area_bias: str
) -> tuple[str, float]:
    """What None stands for: the remainder and area bias that are best on a frozen ViT, as far as a model takes them.

    An area bias that is not given is 0 where the remainder is.
    """
    chosen = ("none" if why_no_remainder else DEFAULT_REMAINDER[0]) if remainder is None else remainder
    if area_bias is None:
        area_bias = 0.0 if remainder is not None or why_no_remainder or why_no_area_bias else DEFAULT_REMAINDER[1]
    return chosen, area_bias


def check_remainder(remainder: str, why_none: str) -> None:
    """Raises CollapseError unless it is one of REMAINDERS, and "none" where there is a reason that none is possible."""
    if remainder not in REMAINDERS:
        raise CollapseError(f"remainder must be one of {', '.join(REMAINDERS)}, got {remainder!r}")
    if remainder != "none" and why_none:
        raise CollapseError(f"remainder must be none, got {remainder!r}: {why_none}")


def check_share(coarse_share: float) -> float:
    """The share as a float; raises CollapseError unless it is in (0, 1]."""
    if not isinstance(coarse_share, Real) or isinstance(coarse_share, bool) or not 0 < coarse_share <= 1:
        raise CollapseError(f"coarse_share must be in (0, 1], got {coarse_share!r}")
    return float(coarse_share)


def check_area_bias(area_bias: float, why_none: str) -> float:
    """The bias as a float; raises CollapseError unless it is finite and >= 0, and 0 where there is a reason for it."""
    number = isinstance(area_bias, Real) and not isinstance(area_bias, bool)
    if not number or not 0 <= area_bias < float("inf"):
        raise CollapseError(f"area_bias must be at least 0 and finite, got {area_bias!r}")
    if area_bias > 0 and why_none:
        raise CollapseError(f"area_bias must be 0, got {area_bias!r}: {why_none}")
    return float(area_bias)


def check_size_embed(size_embed: bool | None, why_none: str) -> None:
    """Raises CollapseError unless it is None or a bool, and not True where there is a reason that none is possible."""
    if not isinstance(size_embed, bool | None):
        raise CollapseError(f"size_embed must be True, False or None, got {size_embed!r}")
    if size_embed and why_none:
        raise CollapseError(f"size_embed must be False, got True: {why_none}")


def check_order(order: Order, batch: int, grid: tuple[int, int]) -> None:
    """Raises CollapseError unless an order is one of `batch` images with patches in `grid`."""
    if not isinstance(order, Order):
        raise CollapseError(f"order must be an Order, got {describe(order)}")
    if order.grid != grid:
        raise CollapseError(f"order must be on the model's grid {grid}, got one on {order.grid}; see Order.resample")
    if (given := order.scores.shape[0]) != batch:
        raise CollapseError(f"order must be of the {batch} images of the batch, got one of {given} images")
