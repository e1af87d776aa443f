"""CollapseOrder: images in, Order out, whatever makes the scores."""

from __future__ import annotations

import copy
from numbers import Real
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..hub.download import bundled_models, loading
from ..hub.files import SETTINGS_FILE
from ..order import (
    BASELINES,
    RANKINGS,
    UNCERTAINTIES,
    CollapseError,
    Order,
    check_grid,
    check_images,
    patch_weights,
    rank_graph,
)
from ..order.errors import describe, values_readable
from ..order.hierarchy import hierarchical_pagerank
from ..order.resampling import check_spread, places_before_spreading
from .comae import CoMAE
from .orderer_sources import saved_settings, source_in_hub
from .ranker import Ranker
from .refine import hierarchical_dependency
from .tokenizer import resize_images

EVIDENCE, BETAS = ("errors", "weights"), ("even", "errors", "scale")
"""What the dependency graph of a CoMAE is made of, and what says how much there is to know about each patch."""
OF_RANKERS = ("phases", "spread_first")
"""Arguments of a ranker that `from_pretrained` takes."""


class CollapseOrder(nn.Module):
    """Orders the patches of images: those that tell most about the others first.

    Args:
        model: A `CoMAE` (exact: its dependency graph, then `ranking`), a `Ranker` (a few cheap phases), or the name of
            a baseline. A network is frozen and put into eval mode.
        ranking: For a CoMAE: "coverage", "pagerank" (the published rule), "in_degree" or "transposed". None: "pagerank"
            with `refine`, else "coverage".
        damping: For the rankings that walk.
        seed: For the baseline "random": an int always gives the same sequence. None draws from torch's own generator:
            each worker of a DataLoader and each epoch has its own orders, and `torch.manual_seed` repeats them.
        spread: How much patches of a finer grid than the model's spread over the image, in [0, 1]: see
            `Order.resample`. The default is measured (docs/results.md, spread_tin100).
        refine: For a CoMAE with the ranking "pagerank", on finer grids than its own: the share of the patches that are
            looked at closer, again and again (`hierarchical_dependency`). 0: the coarse order is resampled.
        evidence: For a CoMAE, what its graph is made of. "errors": what the decoder's errors owe to each patch
            (`CoMAE.evidence`). "weights": the encoder's alone, as published. None: "weights" with `refine`, which needs
            it, else "errors". This default and the next are measured (docs/results.md, comae).
        beta: For a CoMAE, how much there is to know about each patch: the paper's vector, by which rankings weigh what
            is explained. "even": all alike. "errors": the decoder's error given nothing. "scale": the error that it
            expects given the others (`CoMAE.expected`).

    `half`, `bfloat16` and `to` cast the network's layers; what it predicts is ranked in float32. Its weights never go
    to the meta device; where they were built on it, they are loaded again from `source`.

    Attributes:
        model: The network; None for a baseline. baseline_name: The baseline's; None for a network.
        source: The name that `from_pretrained` found it by; None: it was made otherwise. given: What that was given for
            the network, see there.
        mean, std: Normalisation of the images, per channel, as tuples.
        grid: Patch grid (h, w) in which the scores are made; None for a baseline, which scores any grid.
    """

    def __init__(
        self,
        model: CoMAE | Ranker | str,
        ranking: str | None = None,
        damping: float = 0.85,
        seed: int | None = None,
        spread: float = 0.3,
        refine: float = 0.0,
        evidence: str | None = None,
        beta: str = "even",
    ):
        super().__init__()
        self.training, self.source, self.given = False, None, {}
        ranking = ranking or ("pagerank" if refine else "coverage")
        evidence = evidence or ("weights" if refine else "errors")
        if ranking not in RANKINGS:
            raise CollapseError(f"ranking: must be one of {', '.join(RANKINGS)}, got {ranking!r}")
        for name, given, known in (("evidence", evidence, EVIDENCE), ("beta", beta, BETAS)):
            if given not in known:
                raise CollapseError(f"{name}: must be one of {', '.join(known)}, got {given!r}")
        if beta == "scale" and not getattr(model, "has_scale", False):
            raise CollapseError("beta: 'scale' is for a CoMAE that was built with scale=True, got a model without")
        check_spread(spread)
        usable = isinstance(model, CoMAE) and (ranking, evidence, beta) == ("pagerank", "weights", "even")
        if not isinstance(refine, Real) or not 0 <= refine <= 1 or (refine and not usable):
            kind = model if isinstance(model, str) else type(model).__name__
            raise CollapseError(
                "refine: must be in [0, 1], and other than 0 only for a CoMAE with the ranking 'pagerank' of its "
                f"weights and an even beta, got {refine!r} for {kind} with {ranking!r} of its {evidence}, beta {beta!r}"
            )
        self.ranking, self.damping, self.spread, self.refine = ranking, damping, spread, refine
        self.evidence, self.beta = evidence, beta
        self.baseline_name = model if isinstance(model, str) else None
        if self.baseline_name is not None:
            if model not in BASELINES:
                raise CollapseError(f"model: no baseline {model!r}; there are {', '.join(BASELINES)}")
            self.model, self.grid = None, None
            self.generator = None if seed is None else torch.Generator().manual_seed(seed)
            self.mean, self.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
            return
        if not isinstance(model, (CoMAE, Ranker)):
            raise CollapseError(f"model: expected a CoMAE, a Ranker or a baseline's name, got {type(model).__name__}")
        self.model = model.eval().requires_grad_(False)
        self.grid = model.grid
        cfg = getattr(model, "pretrained_cfg", {})
        self.mean, self.std = tuple(cfg.get("mean", (0.5,) * 3)), tuple(cfg.get("std", (0.5,) * 3))

    @classmethod
    def baseline(cls, name: str, seed: int | None = None) -> CollapseOrder:
        """An order that needs no training: random, raster, centre, halton, bayer, variance or gradient."""
        return cls(name, seed=seed)

    @classmethod
    def named(cls, name: str, seed: int | None = None) -> CollapseOrder:
        """A baseline by its name, or anything that `from_pretrained` finds: what an argument `orderer` takes.

        Raises:
            CollapseError: As `from_pretrained`; the message names the argument `orderer`.
        """
        if name in BASELINES:
            return cls.baseline(name, seed)
        try:
            return cls.from_pretrained(name)
        except CollapseError as error:
            raise CollapseError(f"orderer: {str(error).removeprefix('name: ')}") from error

    @classmethod
    def from_pretrained(cls, name: str, **kwargs) -> CollapseOrder:
        """Load a trained orderer.

        Args:
            name: A registered model with weights ("collapse_ranker_tiny"), a local folder ("runs/ranker" or
                "local-dir:runs/ranker"), or a Hub id ("me/my-ranker" or "hf-hub:me/my-ranker").
            kwargs: For `CollapseOrder`: ranking, damping, spread, refine, evidence, beta. For a `Ranker`, instead of
                its own: phases, spread_first.

        Raises:
            CollapseError: Nothing of that name, or a model that makes no order.
        """
        saved, folder = {}, Path(name.removeprefix("local-dir:"))
        if folder.is_dir():
            source, saved = f"local-dir:{folder}", saved_settings(folder / SETTINGS_FILE)
        elif name.startswith("local-dir:"):
            raise CollapseError(f"name: no folder {str(folder)!r} is there, got {name!r}")
        elif timm.is_model(name.split(":")[-1].split(".")[0]):
            source = name
        elif name.startswith("./"):
            raise CollapseError(f"name: {name!r} is no folder here; it is found only beside the weights of its model")
        elif "/" in name:
            source, saved = source_in_hub(name.removeprefix("hf-hub:"))
        else:
            known = [m for m in bundled_models() if m.startswith(("collapse_ranker", "comae"))]
            raise CollapseError(
                f"name: {name!r} is neither a registered model, a folder, nor a Hub id; bundled: {', '.join(known)}"
            )
        given = {name: kwargs.pop(name) for name in OF_RANKERS if name in kwargs}
        # on the CPU: whoever builds the model around it on no device still gets its weights
        with loading(f"name: {name!r}"), torch.device("cpu"):
            model = timm.create_model(source, pretrained=True, **given)
        orderer = cls(model, **{**saved, **kwargs})
        orderer.source, orderer.given = name, given
        return orderer

    def forward(
        self,
        images: Tensor,
        grid: tuple[int, int] | None = None,
        upto: int | None = None,
        check: bool = True,
        weights: Tensor | None = None,
    ) -> Order:
        """Order the patches of each image.

        Args:
            images: (B, 3, H, W), normalised as `mean` and `std`; networks take one channel as grey, baselines any.
            grid: Patch grid (h, w) of the result; None takes the orderer's own.
            upto: Only so many first places (of the result's grid) are needed; orderers with phases save the later ones.
            check: Refuse NaN, for which values are read back from a GPU; a collapsed model's forward pass does not.
            weights: By how much the uncertainty of each patch counts, such as its relevance to a question: (B, N) on
                the grid of the result, or a map (B, H, W) of any resolution, such as a mask or a saliency map. At least
                0, only ratios matter, all alike changes nothing. A patch of weight 0 counts for what it tells about the
                others alone. None: all alike.

        Raises:
            CollapseError: Images of another shape or dtype or with NaN, a bad grid, a baseline without a grid; weights
                of another shape, negative, not finite or all 0, or for an orderer that knows no uncertainty.
        """
        images = self._checked(images, check)
        if grid is None and self.grid is None:
            raise CollapseError("grid: a baseline order needs a patch grid (h, w), got None")
        grid = check_grid(grid if grid is not None else self.grid)
        num_patches = grid[0] * grid[1]
        if upto is not None and not (isinstance(upto, int) and 1 <= upto <= num_patches):
            raise CollapseError(f"upto: must be in [1, {num_patches}] for grid {grid}, got {upto}")
        if weights is not None:
            self._refuse_weights()
            weights = patch_weights(weights, images.shape[0], grid, self.grid, check).to(images.device)
        if self.baseline_name is not None:
            scores = BASELINES[self.baseline_name](images, grid, self.generator)
            return Order.unchecked(scores if weights is None else scores * weights, grid)
        if values_readable() and images.shape[0] == 0:  # the blocks of timm's Eva take no batch of none
            return Order.unchecked(torch.zeros(0, num_patches, device=images.device), grid)
        if (ready := self._ready(images.device)) is not self:
            return ready(images, grid, upto, check, weights)
        if isinstance(self.model, Ranker):
            if grid[0] < self.grid[0] or grid[1] < self.grid[1]:
                upto = None  # a coarser patch averages ranks: it needs the whole order
            if upto is not None and grid != self.grid:
                upto = places_before_spreading(upto, grid, self.grid, self.spread)
            scores = self.model.rank(images, upto, weights=weights)
        elif self.refine:
            graph = hierarchical_dependency(self.model, images, grid, self.refine, self.damping)
            finest = self.grid if isinstance(graph, Tensor) else graph.grid
            return Order.with_spread_ties(hierarchical_pagerank(graph, self.damping), finest).resample(grid)
        else:
            graph, unknown = self._dependencies(images)
            if weights is not None:
                unknown = weights if unknown is None else unknown * weights
            scores = rank_graph(graph, self.ranking, self.damping, unknown)
        return (Order if check else Order.unchecked)(scores, self.grid).resample(grid, self.spread)

    def _refuse_weights(self) -> None:
        """Raises CollapseError where the orderer's scores are no uncertainty of patches."""
        if self.baseline_name in UNCERTAINTIES or self.model is not None and not self.refine:
            return
        kind = self.baseline_name or type(self.model).__name__
        raise CollapseError(
            f"weights must be None for {kind}, which knows no uncertainty of patches that could count more; "
            f"rankers, a CoMAE without refine, and the baselines {' and '.join(UNCERTAINTIES)} do"
        )

    def graph(self, images: Tensor) -> Tensor:
        """The dependency graph of each image: the first of what `dependencies` gives."""
        return self.dependencies(images)[0]

    @torch.no_grad()
    def dependencies(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Who tells how much of whom, and how much there is to know, for a network: what `rank_graph` takes.

        Args:
            images: As `forward` takes them.

        Returns:
            graph (B, N, N) in [0, 1], 0 on the diagonal: A[i, j] is the influence of patch j on patch i. Of a CoMAE
            what `evidence` says; of a ranker the share of the variance of patch i that patch j alone explains. unknown
            (B, N): how much there is to know about each patch, the paper's beta.

        Raises:
            CollapseError: A baseline, or images as `forward` refuses them.
        """
        if self.model is None:
            raise CollapseError(f"graph: only a CoMAE or a ranker has a dependency graph, not {self.baseline_name!r}")
        images = self._checked(images)
        if (ready := self._ready(images.device)) is not self:
            return ready.dependencies(images)
        graph, unknown = self._dependencies(images)
        return graph, torch.ones_like(graph[:, 0]) if unknown is None else unknown

    def _dependencies(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The graph, and how much there is to know about each patch; None: of all alike."""
        if isinstance(self.model, Ranker):
            return self.model.evidence(images)
        images = resize_images(images, (self.model.img_size, self.model.img_size))
        graph = unknown = None
        if "errors" in (self.evidence, self.beta):
            graph, unknown = self.model.evidence(images)
        if self.evidence == "weights":
            graph = self.model.dependency(images)
        if self.beta == "scale":
            unknown = self.model.expected(images)
        return graph, None if self.beta == "even" else unknown

    @property
    def needs_colour(self) -> bool:
        """Whether images must have colours, as `mean` and `std` say: for a network; baselines take any channels."""
        return self.model is not None

    def _checked(self, images: Tensor, values: bool = True) -> Tensor:
        """Images as the orderer takes them, grey ones as RGB; CollapseError for others."""
        check_images(images, None, values)
        if not self.needs_colour:
            return images
        if images.shape[1] not in (1, 3):
            raise CollapseError(
                f"images must have 3 channels (RGB) or 1 (grey) for a {type(self.model).__name__}, got "
                f"{describe(images)}; baselines, such as 'bayer', order images of any channels"
            )
        return images.expand(-1, 3, -1, -1).to(next(self.parameters()).dtype)

    def _ready(self, device: torch.device) -> CollapseOrder:
        """Self, with weights; for images on the meta device, which have only a shape, a copy without."""
        if device.type == "meta":
            if all(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
                return self
            shapes = copy.deepcopy(self)
            shapes.model.to(device)
            return shapes
        if next(self.parameters()).is_meta:
            if not self._load_again():
                raise CollapseError(
                    f"orderer: the weights of this {type(self.model).__name__} are on the meta device, and it has no "
                    "name by which they could be loaded again; build it on a device, or load it by from_pretrained"
                )
            self.to(device)
        return self

    def _load_again(self) -> bool:
        """Whether weights that were built on the meta device could be had."""
        if self.source is not None:
            again = type(self).from_pretrained(self.source, **self.given)
            self.model = again.model.to(next(self.model.parameters()).dtype)
        return not next(self.model.parameters()).is_meta

    def _apply(self, fn, recurse: bool = True):
        weight = next(self.parameters(), None)
        if weight is None:
            return self
        target = fn(torch.zeros((), dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device))
        if target.is_meta or weight.is_meta and not self._load_again():
            return self
        device, dtype = target.device, target.dtype
        return super()._apply(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), recurse)

    def train(self, mode: bool = True) -> CollapseOrder:
        return super().train(False)  # frozen: no dropout, no statistics

    def describe(self, grid: tuple[int, int]) -> str:
        """What decides the orders on a grid beside the network's weights, in words; empty where nothing does."""
        words = "".join(f" {name} {value}" for name, value in self.given.items())
        if self.baseline_name == "random":
            words = f" seed {(self.generator or torch).initial_seed()}"
        elif isinstance(self.model, CoMAE):
            words = f" {self.ranking} {self.damping:g}{' of errors' * (self.evidence == 'errors')}"
            words += f", beta of {self.beta}" * (self.beta != "even")
        if self.grid is not None and any(new > own for new, own in zip(grid, self.grid, strict=True)):
            words += f" refine {self.refine:g}" if self.refine else f" spread {self.spread:g}"
        return words.strip()

    def extra_repr(self) -> str:
        if self.model is None:
            return self.baseline_name
        ranking = f", ranking={self.ranking!r}" if isinstance(self.model, CoMAE) else ""
        source = "" if self.source is None else f", source={self.source!r}"
        return f"{type(self.model).__name__}, grid={self.grid}{ranking}{source}"
