"""CollapseOrder: images in, Order out, whatever makes the scores."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..order import BASELINES, RANKINGS, CollapseError, Order, baseline_scores, check_grid, check_images, rank_graph
from .comae import CoMAE
from .ranker import Ranker
from .tokenizer import resize_images


class CollapseOrder(nn.Module):
    """Orders the patches of images: those that tell most about the others first.

    Args:
        model: A `CoMAE` (exact: its dependency graph, then `ranking`), a `Ranker` (a few cheap phases), or the name of
            a baseline. A network is frozen and put into eval mode.
        ranking: For a CoMAE: "coverage", "pagerank", "in_degree" or "transposed".
        damping: For the rankings that walk.
        seed: For the baseline "random".

    Attributes:
        mean, std: Normalisation of the images, per channel, as tuples.
        grid: Patch grid (h, w) in which the scores are made.
    """

    def __init__(self, model: CoMAE | Ranker | str, ranking: str = "pagerank", damping: float = 0.85, seed: int = 0):
        super().__init__()
        if ranking not in RANKINGS:
            raise CollapseError(f"ranking: must be one of {', '.join(RANKINGS)}, got {ranking!r}")
        self.ranking, self.damping = ranking, damping
        self.baseline_name = model if isinstance(model, str) else None
        if self.baseline_name is not None:
            if model not in BASELINES:
                raise CollapseError(f"model: no baseline {model!r}; there are {', '.join(BASELINES)}")
            self.model, self.grid = None, None
            self.generator = torch.Generator().manual_seed(seed)
            self.mean, self.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
            return
        if not isinstance(model, (CoMAE, Ranker)):
            raise CollapseError(f"model: expected a CoMAE, a Ranker or a baseline's name, got {type(model).__name__}")
        self.model = model.eval().requires_grad_(False)
        self.grid = model.grid
        cfg = getattr(model, "pretrained_cfg", {})
        self.mean, self.std = tuple(cfg.get("mean", (0.5,) * 3)), tuple(cfg.get("std", (0.5,) * 3))

    @classmethod
    def baseline(cls, name: str, seed: int = 0) -> CollapseOrder:
        """An order that needs no training: random, raster, centre, halton, bayer, variance or gradient."""
        return cls(name, seed=seed)

    @classmethod
    def named(cls, name: str, seed: int = 0) -> CollapseOrder:
        """A baseline by its name, or anything that `from_pretrained` finds."""
        return cls.baseline(name, seed) if name in BASELINES else cls.from_pretrained(name)

    @classmethod
    def from_pretrained(cls, name: str, **kwargs) -> CollapseOrder:
        """Load a trained orderer.

        Args:
            name: A registered model with weights ("collapse_ranker_tiny"), a local folder, or a Hub id
            ("me/my-ranker").
            kwargs: For `CollapseOrder`: ranking, damping.

        Raises:
            CollapseError: Nothing of that name, or a model that makes no order.
        """
        if Path(name).is_dir():
            source = f"local-dir:{name}"
        elif timm.is_model(name.split(":")[-1].split(".")[0]):
            source = name
        elif "/" in name:
            source = name if name.startswith(("hf-hub:", "local-dir:")) else f"hf-hub:{name}"
        else:
            known = [m for m in timm.list_models(pretrained=True) if m.startswith(("collapse_ranker", "comae"))]
            raise CollapseError(
                f"name: {name!r} is neither a registered model, a folder, nor a Hub id; bundled: {', '.join(known)}"
            )
        try:
            return cls(timm.create_model(source, pretrained=True), **kwargs)
        except CollapseError:
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise CollapseError(f"name: {name!r} could not be loaded: {error or type(error).__name__}") from error

    def forward(self, images: Tensor, grid: tuple[int, int] | None = None, upto: int | None = None) -> Order:
        """Order the patches of each image.

        Args:
            images: (B, C, H, W), normalised as `mean` and `std`.
            grid: Patch grid (h, w) of the result; None takes the orderer's own.
            upto: Only so many first places (of the result's grid) are needed; orderers with phases save the later ones.

        Raises:
            CollapseError: Images of another shape or dtype or with NaN, a bad grid, a baseline without a grid.
        """
        check_images(images)
        if grid is None and self.grid is None:
            raise CollapseError("grid: a baseline order needs a patch grid (h, w), got None")
        grid = check_grid(grid if grid is not None else self.grid)
        num_patches = grid[0] * grid[1]
        if upto is not None and not (isinstance(upto, int) and 1 <= upto <= num_patches):
            raise CollapseError(f"upto: must be in [1, {num_patches}] for grid {grid}, got {upto}")
        if self.baseline_name is not None:
            return Order(baseline_scores(self.baseline_name, images, grid, self.generator), grid)
        if isinstance(self.model, Ranker):
            own = self.model.num_patches
            if grid[0] < self.grid[0] or grid[1] < self.grid[1]:
                upto = None  # a coarser patch averages ranks: it needs the whole order
            scores = self.model.rank(images, None if upto is None else -(-upto * own // num_patches))
        else:
            scores = rank_graph(self.graph(images), self.ranking, self.damping)
        return Order(scores, self.grid).resample(grid)

    @torch.no_grad()
    def graph(self, images: Tensor) -> Tensor:
        """Dependency graph (B, N, N) of a CoMAE: A[i, j] is the influence of patch j on patch i."""
        if not isinstance(self.model, CoMAE):
            raise CollapseError("graph: only a CoMAE has a dependency graph")
        side = self.model.img_size
        return self.model.dependency(resize_images(images, (side, side)))

    def train(self, mode: bool = True) -> CollapseOrder:
        return super().train(False)  # frozen: no dropout, no statistics

    def extra_repr(self) -> str:
        return f"{self.baseline_name or type(self.model).__name__}, grid={self.grid}, ranking={self.ranking!r}"
