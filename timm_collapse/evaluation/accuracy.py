"""Measuring accuracy over keep: what a classifier still knows when it sees only the first patches of an order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..collapse.base import Collapsed
from ..collapse.convert import collapse
from ..collapse.remainder import OF_CELLS
from ..data import ImageLoader
from ..models.orderer import CollapseOrder
from ..order import CollapseError, Order, check_keeps, resolve_keep
from .cost import autocast
from .curve import KEEPS, AccuracyCurve


def with_orderer(
    model: nn.Module,
    orderer: CollapseOrder | str,
    remainder: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A collapsed copy of a model that shares its weights: one set of weights serves many orderers.

    Args:
        model: A model that `collapse` takes; it stays as it is.
        orderer, mean, std: As for `collapse`.
        remainder: As for `collapse`; None keeps that of a collapsed model, and is "none" for a plain one.

    Raises:
        CollapseError: As `collapse`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    collapsed = isinstance(model, Collapsed)
    remainder = remainder or (model.remainder if collapsed else "none")
    settings = {"coarse_share": model.coarse_share, "area_bias": model.area_bias} if collapsed else {}
    return collapse(twin, orderer, keep=1.0, remainder=remainder, mean=mean, std=std, **settings)


class _Plain(nn.Module):
    """A collapsed model that always keeps all: it has no `keep`, so it counts as a plain one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def plain_model(model: nn.Module) -> nn.Module:
    """A model that sees all patches, with shared weights: itself, unless it is collapsed."""
    return _Plain(with_orderer(model, model.orderer)) if isinstance(model, Collapsed) else model


@torch.no_grad()
def accuracy_curves(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    keeps: Sequence[float] = KEEPS,
    precision: str = "no",
    device: torch.device | str | None = None,
    total: int | None = None,
    progress: bool = True,
) -> dict[str, AccuracyCurve]:
    """Accuracy of several models at several keep ratios, in one pass over the data.

    The order of each image is computed once for all keeps, and for all models that have the same orderer object, patch
    grid and normalisation. `with_orderer` makes one model's (model, orderer) pairs.

    Args:
        models: Name -> collapsed model, at its own orderer and remainder; a model without `keep` (a plain one) is
            measured at 1.0 alone. They are moved to the device; their `keep` and mode are restored.
        batches: Images (B, 3, H, W), normalised for all the models alike, and labels (B,) long in [0, classes).
        keeps: Ratios in (0, 1]; sorted, largest first.
        precision: "no" for fp32, "bf16" for autocast, orders included.
        device: None takes a GPU where there is one.
        total: Number of images, for the progress bar.
        progress: Show it (on stderr).

    Raises:
        CollapseError: No models, no images, a wrong keep, precision or label, or an order that a model refuses.
    """
    keeps = check_keeps(keeps)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not models:
        raise CollapseError("models must hold at least one, got none")
    ratios = {name: keeps if hasattr(model, "keep") else [1.0] for name, model in models.items()}
    hits = {name: torch.zeros(2, len(ratios[name]), dtype=torch.long) for name in models}
    before = {name: (model.training, getattr(model, "keep", None)) for name, model in models.items()}
    count = 0
    try:
        for model in models.values():
            model.to(device).eval()
        with tqdm(total=total, unit="image", desc="accuracy", disable=not progress) as bar:
            for images, labels in batches:
                if len(images) != len(labels):
                    raise CollapseError(f"labels must be one an image, got {len(labels)} for {len(images)} images")
                if not len(images):
                    continue
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                orders: dict[Any, Order | None] = {}
                with autocast(device, precision):
                    for name, model in models.items():
                        order = _shared_order(model, images, keeps, orders)
                        for i, keep in enumerate(ratios[name]):
                            hits[name][:, i] += _hits(_logits(model, images, keep, order), labels, name)
                count += len(images)
                bar.update(len(images))
    finally:
        for name, (training, keep) in before.items():
            models[name].train(training)
            if keep is not None:
                models[name].keep = keep
    if not count:
        raise CollapseError("batches must hold at least one image, got none")
    return {name: AccuracyCurve(ratios[name], *hits[name].tolist(), count) for name in models}


def _shared_order(model: nn.Module, images: Tensor, keeps: list[float], orders: dict[Any, Order | None]):
    """The order of a batch up to the last place that any keep needs; `orders` holds those of the batch so far."""
    if not hasattr(model, "keep"):
        return None
    if getattr(model, "remainder", "none") in OF_CELLS:
        return None  # each keep has its own: cells go by the later ranks, too, which are a guess beyond its places
    grid = model.image_grid(images)
    key = (id(model.orderer), grid, model.normalisation)
    if key not in orders:
        num_patches = grid[0] * grid[1]
        needed = [k for k in (resolve_keep(keep, num_patches) for keep in keeps) if k < num_patches]
        orders[key] = model.compute_order(images, upto=max(needed)) if needed else None
    return orders[key]


def _logits(model: nn.Module, images: Tensor, keep: float, order: Order | None) -> Tensor:
    if not hasattr(model, "keep"):
        return model(images)
    model.keep = keep
    return model(images, order=order)


def _hits(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    """(2,) long on the CPU: images of a batch whose label is the best, and among the best five."""
    classes = logits.shape[1]
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise CollapseError(f"labels must be in [0, {classes}), the classes of {name}, got {int(low)} to {int(high)}")
    right = logits.float().topk(min(5, classes), dim=1).indices == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum()]).cpu()


class _Even(Dataset):
    """`count` evenly spaced samples of a data set, transformed."""

    def __init__(self, dataset: Dataset, transform: Callable, count: int):
        self.dataset, self.transform, self.count = dataset, transform, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index * len(self.dataset) // self.count]
        return self.transform(image), int(label)


def image_batches(
    dataset: Dataset, transform: Callable, images: int = 0, batch_size: int = 64, workers: int = 0
) -> ImageLoader:
    """Batches for `accuracy_curves`, decoded as they are needed.

    Args:
        dataset: Map-style (PIL image, label).
        transform: PIL image -> normalised tensor (3, H, W).
        images: Evenly spaced samples, so that sorted classes all have their share; 0, or more than there are: all.
        batch_size: Images in a batch, at least 1.
        workers: Processes that decode.

    Raises:
        CollapseError: For other numbers.
    """
    if images < 0 or batch_size < 1:
        raise CollapseError(f"images must be at least 0 and batch_size at least 1, got {images} and {batch_size}")
    count = min(images or len(dataset), len(dataset))
    return ImageLoader(_Even(dataset, transform, count), batch_size, num_workers=workers)
