"""Measuring generated images with the features of any timm classifier: everything here runs offline.

Numbers of different feature models cannot be compared, and none is an FID or an Inception score: those need Inception's
features, see `fidelity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.normalisation import Normalisation
from ..order import CollapseError
from ..order.errors import describe
from .cost import autocast
from .distances import check_features, classifier_score, frechet_distance, kid, prdc
from .feature_statistics import FeatureStatistics

Batches = Iterable[Tensor | tuple[Tensor, Tensor]]


@dataclass
class Features:
    """What a network says of N images.

    Attributes:
        features: (N, D) float32 on the CPU: pooled, as the classifier's last layer gets them.
        logits: (N, C) float32 on the CPU.
        labels: (N,) long, the classes that the images were asked for or have; None where the batches had none.
        name: What the features are: features of different names are never compared.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None
    name: str

    def statistics(self) -> FeatureStatistics:
        """Their mean and covariance."""
        return FeatureStatistics(self.name).update(self.features)


@dataclass
class GenerationReport:
    """Generated images against real ones, in the features of one classifier. Not comparable with FID and its kin.

    Attributes:
        features: The feature model.
        samples: Number of generated images.
        references: Number of real images behind `frechet`; None where the statistics do not say.
        frechet: Squared Fréchet distance of the features, from 0; falls with the number of images alone, so compare at
            equal numbers only.
        kid, kid_std: Squared kernel distance, mean and standard deviation over random subsets; about 0 is best.
        precision, recall, coverage: In [0, 1]; 1 is best.
        density: From 0; about 1 for equal distributions.
        classifier_score, classifier_score_std: exp of the mutual information of image and class, in [1, classes].
        label_accuracy: Share, in [0, 1], of generated images to which the classifier gives the label that they were
            asked for; None without labels.
        k: Neighbours of precision, recall, density and coverage.

        kid to coverage are None where only the statistics of the real images are known.
    """

    features: str
    samples: int
    references: int | None
    frechet: float
    kid: float | None
    kid_std: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    classifier_score: float
    classifier_score_std: float
    label_accuracy: float | None
    k: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-serialisable."""
        return dataclasses.asdict(self)


@torch.no_grad()
def extract_features(
    model: nn.Module,
    images: Tensor | Batches,
    name: str = "",
    batch_size: int = 64,
    precision: str = "no",
    device: torch.device | str | None = None,
    total: int | None = None,
    progress: bool = True,
) -> Features:
    """Features and logits of images by a timm classifier.

    The whole image is resized (antialiased, with the model's interpolation) to the model's input size, without the
    central crop of timm's evaluation: what a generator does at the borders counts too. Images of another aspect ratio
    are first cropped to the model's.

    Args:
        model: Any timm model with `forward_features` and `forward_head`; it is moved to the device, its mode restored.
        images: (N, 3, H, W), or batches of such, alone or as pairs with labels (B,) long. uint8, or floating point in
            [0, 1] and not normalised: that happens here.
        name: What to call the features; "" for the model's architecture and tag, whatever weights it has by now.
        batch_size: Images in a pass, where `images` is one tensor.
        precision: "no" for fp32, "bf16" for autocast.
        device: None takes a GPU where there is one.
        total: Number of images, for the progress bar.
        progress: Show it (on stderr).

    Raises:
        CollapseError: No images, images of another shape or range, a wrong precision, or a model without pooled
            features.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise CollapseError(f"model must have forward_features and forward_head, as timm's, got {type(model).__name__}")
    prepare = _preparation(model)
    training = model.training
    features, logits, labels = [], [], []
    try:
        model.to(device).eval()
        with tqdm(total=total, unit="image", desc="features", disable=not progress) as bar, autocast(device, precision):
            for batch, given in image_batches_of(images, batch_size):
                tokens = model.forward_features(prepare(batch.to(device, non_blocking=True)))
                pooled = model.forward_head(tokens, pre_logits=True)
                if pooled[0].numel() != pooled.shape[1]:
                    raise CollapseError(f"model must pool its features to (B, D), got {describe(pooled)}")
                features.append(pooled.flatten(1).float().cpu())
                logits.append(model.forward_head(tokens).float().cpu())
                labels.append(given)
                bar.update(len(batch))
    finally:
        model.train(training)
    return Features(torch.cat(features), torch.cat(logits), join_labels(labels), name or model_name(model))


def evaluate_generation(
    fake: Features,
    real: Features | None = None,
    statistics: FeatureStatistics | None = None,
    k: int = 5,
    kid_subset_size: int | None = None,
    kid_subsets: int = 100,
    splits: int = 10,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> GenerationReport:
    """Compares generated with real images.

    Args:
        fake: Of the generated images; with labels, those that they were asked for.
        real: Of real images; may be None with statistics.
        statistics: Of real images; takes the place of `real` in the Fréchet distance.
        k: Neighbours of precision, recall, density and coverage, less than both numbers of images.
        kid_subset_size: At least 2; None for 1,000, or half of the smaller set where that is less.
        kid_subsets: Random subsets of the kernel distance.
        splits: Parts of the classifier score, at most the number of generated images.
        seed: Of subsets and parts.
        device: Where distances are computed, in float64 (on the CPU for a device without it); None takes a GPU where
            there is one.

    Raises:
        CollapseError: Neither real images nor statistics; features of different models or widths, or with NaN; labels
            that the classifier does not have; too few images for k, the subsets or the splits.
    """
    if real is None and statistics is None:
        raise CollapseError("real and statistics: at least one of them is needed, got neither")
    for other, argument in ((real and real.name, "real"), (statistics and statistics.features, "statistics")):
        if other and fake.name and other != fake.name:
            raise CollapseError(f"{argument} must be of the same features as fake, {fake.name!r}, got {other!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    images = check_features(fake.features, "fake").to(device)
    score = classifier_score(fake.logits, splits, generator)
    accuracy = None if fake.labels is None else _label_accuracy(fake.logits, fake.labels)
    kernel, neighbours = (None, None), (None, None, None, None)
    if real is not None:
        reference = check_features(real.features, "real").to(device)
        neighbours = prdc(reference, images, k)
        size = min(1000, max(2, min(len(images), len(reference)) // 2)) if kid_subset_size is None else kid_subset_size
        kernel = kid(images, reference, size, kid_subsets, generator)
        statistics = statistics or FeatureStatistics(real.name).update(reference)
    own = FeatureStatistics(fake.name).update(images)
    frechet = frechet_distance(own.mean, own.covariance, statistics.mean, statistics.covariance)
    return GenerationReport(
        fake.name, len(images), statistics.count, frechet, *kernel, *neighbours, *score, accuracy, k
    )


def image_batches_of(images: Tensor | Batches, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Checked batches of images (B, 3, H, W), uint8 or in [0, 1], with labels or None.

    Raises:
        CollapseError: No images, or images that are not as above.
    """
    if isinstance(images, Tensor):
        if batch_size < 1:
            raise CollapseError(f"batch_size must be at least 1, got {batch_size}")
        images = images.split(batch_size) if images.ndim and len(images) else ()
    empty = True
    for each in images:
        batch, labels = each if isinstance(each, (tuple, list)) else (each, None)
        if not isinstance(batch, Tensor) or batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
            raise CollapseError(f"images must be of shape (B, 3, H, W) and not empty, got {describe(batch)}")
        if batch.dtype != torch.uint8:
            if not batch.is_floating_point():
                raise CollapseError(f"images must be uint8, or floating point in [0, 1], got {describe(batch)}")
            low, high = (float(value) for value in batch.aminmax())
            if not (low >= 0 and high <= 1):  # NaN is neither
                raise CollapseError(f"images must be in [0, 1], clamped and not normalised, got {low:g} to {high:g}")
        empty = False
        yield batch, labels
    if empty:
        raise CollapseError("images must hold at least one, got none")


def join_labels(labels: list[Tensor | None]) -> Tensor | None:
    """(N,) labels of all batches; None where none has any; CollapseError where only some have."""
    missing = sum(each is None for each in labels)
    if missing == len(labels):
        return None
    if missing:
        raise CollapseError(f"labels must be given for all batches or none, got {missing} of {len(labels)} without")
    return torch.cat([each.cpu() for each in labels])


def model_name(model: nn.Module) -> str:
    """Architecture and tag of a timm model; the class's name for any other."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag")))) or type(model).__name__


def _preparation(model: nn.Module):
    """Images (B, 3, H, W), uint8 or in [0, 1], to what the model takes."""
    from timm.data import resolve_model_data_config

    # a model may have been made at another size than its pretrained_cfg says
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config = resolve_model_data_config(model, args={"input_size": (3, *size)} if size else None)
    height, width = config["input_size"][1:]
    normalisation = Normalisation.of(config)
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"

    def prepare(images: Tensor) -> Tensor:
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        full = images.shape[-2:]
        scale = min(full[0] / height, full[1] / width)
        crop = [max(1, round(scale * side)) for side in (height, width)]
        top, left = ((side - kept) // 2 for side, kept in zip(full, crop))
        images = images[..., top : top + crop[0], left : left + crop[1]]
        # as Pillow, which the models were trained with: rows, then columns, overshoots clipped after each
        for size in ((crop[0], width), (height, width)):
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)
        return normalisation.apply(images)

    return prepare


def _label_accuracy(logits: Tensor, labels: Tensor) -> float:
    if labels.shape != (len(logits),) or labels.is_floating_point():
        raise CollapseError(f"labels must be ({len(logits)},) integers, one an image, got {describe(labels)}")
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise CollapseError(f"labels must be in [0, {logits.shape[1]}), the classifier's classes, got {low} to {high}")
    return float((logits.argmax(1) == labels).double().mean())
