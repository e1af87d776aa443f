"""FID, Inception score, KID, precision and recall with Inception's features, by torch-fidelity's own functions.

torch-fidelity's "inception-v3-compat" is the network of the original FID, its resizing included, so the numbers can be
compared with published ones where the number of images and the reference are the same too.
"""

from __future__ import annotations

import dataclasses
import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..order import CollapseError
from .distances import check_features
from .feature_statistics import FeatureStatistics
from .generation import Batches, Features, image_batches_of, join_labels

EXTRACTOR = "inception-v3-compat"
SEED = 2020  # torch-fidelity's, for the shuffling of the Inception score and the subsets of KID


@dataclass
class InceptionReport:
    """Generated images against real ones, in Inception's features.

    Attributes:
        samples: Number of generated images; published FIDs take 50,000, and FID falls with the number.
        references: Number of real images behind `fid`; None where the statistics do not say.
        fid: Fréchet Inception distance (Heusel et al. 2017); None without statistics and real images.
        inception_score, inception_score_std: Over 10 splits (Salimans et al. 2016), from the logits without bias.
        kid, kid_std: Kernel Inception distance over 100 subsets (Binkowski et al. 2018).
        precision, recall: With k neighbours (Kynkäänniemi et al. 2019), in [0, 1]; on Inception's features, as ADM
            reports them (the paper's own are VGG-16's).
        k: The neighbours.

        kid, precision and recall are None without real images.
    """

    samples: int
    references: int | None
    fid: float | None
    inception_score: float
    inception_score_std: float
    kid: float | None
    kid_std: float | None
    precision: float | None
    recall: float | None
    k: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-serialisable."""
        return dataclasses.asdict(self)


@torch.no_grad()
def extract_inception_features(
    images: Tensor | Batches,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    total: int | None = None,
    progress: bool = True,
) -> Features:
    """Inception's pooled features (N, 2048) and its logits without bias (N, 1008).

    Args:
        images: As for `extract_features`, at their own size: the network resizes as the original did. Those in [0, 1]
            are rounded to 8 bits.
        weights: torch-fidelity's weights file; None for the copy in torch's cache, downloaded where there is none.
        batch_size, device, total, progress: As for `extract_features`.

    Raises:
        CollapseError: No torch-fidelity, no weights, or images that are not as above.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = _load(weights).to(device)
    features, logits, labels = [], [], []
    with tqdm(total=total, unit="image", desc="Inception", disable=not progress) as bar:
        for batch, given in image_batches_of(images, batch_size):
            if batch.dtype != torch.uint8:
                batch = (batch.float() * 255).round().to(torch.uint8)
            out = network.convert_features_tuple_to_dict(network(batch.to(device, non_blocking=True)))
            features.append(out[_layer("fid")].cpu())
            logits.append(out[_layer("isc")].cpu())
            labels.append(given)
            bar.update(len(batch))
    return Features(torch.cat(features), torch.cat(logits), join_labels(labels), EXTRACTOR)


def evaluate_inception(
    fake: Features,
    real: Features | None = None,
    statistics: FeatureStatistics | None = None,
    k: int = 3,
    kid_subset_size: int | None = None,
) -> InceptionReport:
    """FID and its kin of generated images.

    Args:
        fake: `extract_inception_features` of the generated images, at least 10.
        real: Of real images.
        statistics: `mu` and `sigma` of real images, such as those in ADM's reference batches; they take the place of
            `real` in the FID.
        k: Neighbours of precision and recall, less than both numbers of images.
        kid_subset_size: At least 2; None for 1,000, or half of the smaller set where that is less.

    Raises:
        CollapseError: No torch-fidelity, features that are not Inception's, or too few images.
    """
    for other, argument in ((fake.name, "fake"), (real and real.name, "real")):
        if other and other != EXTRACTOR:
            raise CollapseError(f"{argument} must be of {EXTRACTOR!r} (extract_inception_features), got {other!r}")
    if statistics is not None and statistics.features not in ("", EXTRACTOR):
        raise CollapseError(f"statistics must be of {EXTRACTOR!r} or of no name, got {statistics.features!r}")
    splits = 10
    if len(fake.features) < splits:
        raise CollapseError(
            f"fake must hold at least {splits} images, the splits of the score, got {len(fake.features)}"
        )
    check_features(fake.features, "fake")
    fid, kernel, neighbours = None, (None, None), (None, None)
    if real is not None:
        check_features(real.features, "real")
        most = min(len(fake.features), len(real.features))
        if not 1 <= k < most:
            raise CollapseError(f"k must be 1 to {most - 1}, one less than the images of the smaller set, got {k}")
        size = min(1000, max(2, most // 2)) if kid_subset_size is None else kid_subset_size
        if not 2 <= size <= most:
            raise CollapseError(f"kid_subset_size must be 2 to {most}, got {size}")
        found = _module("metric_kid").kid_features_to_metric(
            fake.features, real.features, kid_subset_size=size, rng_seed=SEED, verbose=False
        )
        kernel = (found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"])
        # save_cpu_ram: without it all distances are held at once, 10 GB for each pair of 50,000 images
        found = _module("metric_prc").prc_features_to_metric(
            fake.features, real.features, prc_neighborhood=k, save_cpu_ram=True, verbose=False
        )
        neighbours = (found["precision"], found["recall"])
        statistics = statistics or real.statistics()
    if statistics is not None:
        fid = _fid(fake.statistics(), statistics)
    score = _module("metric_isc").isc_features_to_metric(fake.logits, splits, True, SEED)
    return InceptionReport(
        samples=len(fake.features),
        references=statistics and statistics.count,
        fid=fid,
        inception_score=score["inception_score_mean"],
        inception_score_std=score["inception_score_std"],
        kid=kernel[0],
        kid_std=kernel[1],
        precision=neighbours[0],
        recall=neighbours[1],
        k=k,
    )


def _fid(fake: FeatureStatistics, real: FeatureStatistics) -> float:
    if fake.mean.shape != real.mean.shape:
        raise CollapseError(f"statistics must have the width {len(fake.mean)} of the features, got {len(real.mean)}")
    both = ({"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (fake, real))
    return _module("metric_fid").fid_statistics_to_metric(*both, False)["frechet_inception_distance"]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise CollapseError(f"Inception's metrics need torch-fidelity: pip install torch-fidelity ({error})") from error


def _layer(metric: str) -> str:
    extractor = _module("registry").FEATURE_EXTRACTORS_REGISTRY[EXTRACTOR]
    return extractor.get_default_feature_layer_for_metric(metric)


def _load(weights: str | Path | None) -> nn.Module:
    """The network; CollapseError where its weights are not to be had."""
    utils, layers = _module("utils"), [_layer("fid"), _layer("isc")]
    url = _module("feature_extractor_inceptionv3").URL_INCEPTION_V3
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if weights is not None:
        try:
            torch.load(weights, weights_only=True)  # torch-fidelity itself would run any code in the file
        except Exception as error:  # whatever a file that is none of weights makes of it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CollapseError(f"weights: {weights} cannot be read as a file of weights: {reason}") from error
    try:
        return utils.create_feature_extractor(
            EXTRACTOR,
            layers,
            cuda=False,
            feature_extractor_weights_path=None if weights is None else str(weights),
            verbose=False,
        )
    except OSError as error:  # no network, among others
        raise CollapseError(
            f"weights: Inception's could not be downloaded ({error}); download {url} elsewhere and place it at "
            f"{cached}, or name the file (weights=, --inception FILE)"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CollapseError(f"weights: {weights or cached} are not those of {url}: {error}") from error
