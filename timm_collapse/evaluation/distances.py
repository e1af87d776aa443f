"""How far generated images are from real ones in a feature space: the maths alone, in float64, on any features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..order import CollapseError
from ..order.errors import describe

CHUNK_ELEMENTS = 2**24  # distances held at a time by `prdc`: 128 MB
SAME = 1e-12  # a squared distance below this share of the squared norms is rounding: the points are the same


class Prdc(NamedTuple):
    """Precision, recall and coverage in [0, 1]; density from 0, about 1 for equal distributions, not bounded by it."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). The last trace is the sum of the square roots of the eigenvalues
    of C1^(1/2) C2 C1^(1/2), which are the squared singular values of F1^T F2 where Ci = Fi Fi^T. Taking the singular
    values keeps everything real and avoids square roots of rounding errors where a covariance is singular, as it is
    with fewer images than features.

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric, positive semi-definite.

    Returns:
        At least 0, in squared units of the features.

    Raises:
        CollapseError: Shapes that do not fit, or values that are not finite.
    """
    mean1, cov1, mean2, cov2 = (each.detach().double().cpu() for each in (mean1, cov1, mean2, cov2))
    check_gaussian(mean1, cov1, "mean1 and cov1")
    check_gaussian(mean2, cov2, "mean2 and cov2")
    if mean1.shape != mean2.shape:
        raise CollapseError(f"both means must have the same width, got {len(mean1)} and {len(mean2)}")
    shared = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared))


def _factor(covariance: Tensor) -> Tensor:
    """(D, r) F with F F^T = covariance of rank r; what is within rounding of 0 is none of its rank."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def kid(
    features1: Tensor,
    features2: Tensor,
    subset_size: int = 1000,
    subsets: int = 100,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Kernel distance: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 3).

    Means over random subsets, drawn without replacement. Unlike the Fréchet distance it does not depend on the number
    of images, so small sets can be compared with large ones; slightly negative means are as likely as positive ones
    where the distributions are equal.

    Args:
        features1, features2: (N, D) and (M, D) floating point, finite, on one device.
        subset_size: Images of each set in a subset, 2 to min(N, M).
        subsets: At least 1.
        generator: On the CPU; None for a fresh one of seed 0.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        CollapseError: Features or numbers that are not as above.
    """
    features1, features2 = _check_pair(features1, features2, "features1", "features2")
    most = min(len(features1), len(features2))
    if not 2 <= subset_size <= most:
        raise CollapseError(f"subset_size must be 2 to {most}, the images of the smaller set, got {subset_size}")
    if subsets < 1:
        raise CollapseError(f"subsets must be at least 1, got {subsets}")
    generator = generator or torch.Generator().manual_seed(0)

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        x, y = draw(features1), draw(features2)
        within = sum(each.sum() - each.trace() for each in (kernel(x, x), kernel(y, y)))
        values.append(within / (subset_size * (subset_size - 1)) - 2 * kernel(x, y).mean())
    distances = torch.stack(values)
    return float(distances.mean()), float(distances.std(correction=0))


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> Prdc:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Every image carries a ball that reaches to its k-th nearest neighbour in its own set, itself not counted. Precision:
    share of fake images in some real ball; recall: share of real images in some fake ball; density: mean number of
    real balls around a fake image, divided by k; coverage: share of real balls that hold a fake image. As in the
    authors' programs, the balls of the first two contain their surface, those of the others do not: a set without
    duplicates compared with itself gets 1 four times, and a real image with k copies cannot be covered.

    Exact; memory stays at a few blocks of CHUNK_ELEMENTS distances.

    Args:
        real: (N, D) floating point, finite.
        fake: (M, D), on the same device.
        k: Neighbours, 1 to min(N, M) - 1. Usual are 3 for precision and recall, 5 for density and coverage.

    Raises:
        CollapseError: Features that are not as above, or too few images for k.
    """
    real, fake = _check_pair(real, fake, "real", "fake")
    most = min(len(real), len(fake)) - 1
    if not 1 <= k <= most:
        raise CollapseError(f"k must be 1 to {most}, one less than the images of the smaller set, got {k}")
    real_radius, fake_radius = _squared_radii(real, k), _squared_radii(fake, k)
    inside, balls = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for part in _chunks(fake, real):
        distances = _squared_distances(fake[part], real)
        inside += int((distances <= real_radius).any(1).sum())
        within = distances < real_radius
        balls += int(within.sum())
        covered |= within.any(0)
        recalled |= (distances <= fake_radius[part, None]).any(0)
    shares = (inside / len(fake), float(recalled.double().mean()), balls / (k * len(fake)))
    return Prdc(*shares, float(covered.double().mean()))


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """(N,) squared distance to the k-th nearest other point; a copy of a point is another point."""
    radii = []
    for part in _chunks(points, points):
        distances = _squared_distances(points[part], points)
        distances[torch.arange(len(distances)), torch.arange(part.start, part.start + len(distances))] = torch.inf
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = norms - 2 * (x @ y.T)
    return distances.masked_fill_(distances <= SAME * norms, 0.0)


def _chunks(rows: Tensor, columns: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // len(columns))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def classifier_score(logits: Tensor, splits: int = 10, generator: torch.Generator | None = None) -> tuple[float, float]:
    """The Inception score's formula on any classifier: exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, eq. 1).

    It is the Inception score only with the logits of Inception. High where each image is sure and all classes occur;
    it sees neither real images nor how varied the images of a class are.

    Args:
        logits: (N, C) floating point, finite.
        splits: Equal parts of the shuffled images that are scored each, 1 to N.
        generator: Shuffles; on the CPU; None for a fresh one of seed 0.

    Returns:
        Mean and standard deviation over the splits; the mean is in [1, C].

    Raises:
        CollapseError: Logits or splits that are not as above.
    """
    logits = check_features(logits, "logits").cpu()
    if not 1 <= splits <= len(logits):
        raise CollapseError(f"splits must be 1 to {len(logits)}, the number of images, got {splits}")
    # samples often come sorted by class: parts of neighbours would hold few classes each
    shuffled = logits[torch.randperm(len(logits), generator=generator or torch.Generator().manual_seed(0))]
    scores = []
    for part in shuffled.tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))  # finite where all p of a class underflow
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def check_features(features: Tensor, name: str) -> Tensor:
    """Features (N, D) in float64, N and D at least 1; CollapseError, under `name`, for anything else or NaN."""
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise CollapseError(f"{name} must be a float tensor of shape (images, width), got {describe(features)}")
    if not features.numel():
        raise CollapseError(f"{name} must not be empty, got {describe(features)}")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise CollapseError(f"{name} must be finite, got NaN or inf for {bad} of {len(features)} images")
    return features.detach().double()


def _check_pair(first: Tensor, second: Tensor, name1: str, name2: str) -> tuple[Tensor, Tensor]:
    first, second = check_features(first, name1), check_features(second, name2)
    if first.shape[1] != second.shape[1]:
        raise CollapseError(f"{name1} and {name2} must have the same width, got {first.shape[1]} and {second.shape[1]}")
    return first, second


def check_gaussian(mean: Tensor, covariance: Tensor, name: str) -> None:
    """CollapseError, under `name`, unless they are a finite mean (D,) and covariance (D, D)."""
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise CollapseError(f"{name} must have a mean (D,) and a covariance (D, D), got {shapes}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise CollapseError(f"{name} must be finite, got NaN or inf")
