"""Mean and covariance of features, gathered in a stream, and the .npz files that hold them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..order import CollapseError
from .distances import check_features, check_gaussian


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch without keeping the features.

    The batches' own means are subtracted before anything is squared (Chan et al. 1979), so features far from 0 lose no
    digits.

    Attributes:
        features: What the features are, such as the name of their model; "" where it is not known.
        count: Number of images; None where a file did not say.
        mean: (D,) float64; (0,) before the first batch.
    """

    def __init__(self, features: str = ""):
        self.features = features
        self.count: int | None = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of outer products; of unknown count: covariance

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by count - 1).

        Raises:
            CollapseError: Fewer than two images.
        """
        if self.count is None:
            return self._scatter
        if self.count < 2:
            raise CollapseError(f"a covariance needs the features of at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Adds a batch.

        Args:
            features: (B, D) floating point, finite, on any device.

        Returns:
            Itself.

        Raises:
            CollapseError: Features of another shape, width or with NaN; statistics of an unknown count.
        """
        features = check_features(features, "features")
        mean = features.mean(0)
        centred = features - mean
        return self._add(len(features), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Adds what another gathered, as if its batches had come here.

        Returns:
            Itself.

        Raises:
            CollapseError: Statistics of other features or another width, or of an unknown count.
        """
        if self.features and other.features and self.features != other.features:
            raise CollapseError(f"statistics must be of the same features, got {self.features!r}, {other.features!r}")
        if other.count is None:
            raise CollapseError("statistics of an unknown number of images cannot be merged")
        return self._add(other.count, other.mean, other._scatter) if other.count else self

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> FeatureStatistics:
        if self.count is None:
            raise CollapseError("statistics of an unknown number of images cannot be added to")
        if not self.count:
            self.count, self.mean, self._scatter = count, mean.clone(), scatter.clone()
            return self
        if len(mean) != len(self.mean):
            raise CollapseError(f"features must have the width {len(self.mean)} of those before, got {len(mean)}")
        total, shift = self.count + count, mean - self.mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return self

    def to_npz(self, path: str | Path) -> None:
        """Writes `mu` (D,) and `sigma` (D, D), float64, as ADM's and pytorch-fid's files; also `count`, `features`."""
        facts = {} if self.count is None else {"count": self.count}
        with open(path, "wb") as file:
            np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), features=self.features, **facts)

    @classmethod
    def from_npz(cls, path: str | Path) -> FeatureStatistics:
        """Reads what `to_npz` wrote, or any .npz with `mu` and `sigma` (ADM's reference batches hold them).

        Raises:
            CollapseError: A file that cannot be read, without the two, or with such that do not fit or are not finite.
        """
        with open_npz(path) as data:
            if missing := {"mu", "sigma"} - set(data.files):
                raise CollapseError(f"statistics: {path} holds no {' and '.join(sorted(missing))}, only {data.files}")
            mean, covariance = (torch.from_numpy(np.asarray(data[key], dtype=np.float64)) for key in ("mu", "sigma"))
            count = int(data["count"]) if "count" in data.files else None
            features = str(data["features"]) if "features" in data.files else ""
        check_gaussian(mean, covariance, str(path))
        loaded = cls(features)
        loaded.count, loaded.mean = count, mean
        loaded._scatter = covariance if count is None else covariance * (count - 1)
        return loaded


def open_npz(path: str | Path) -> np.lib.npyio.NpzFile:
    """An open .npz file, without pickled objects; CollapseError where it cannot be read."""
    try:
        data = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CollapseError(f"npz: {path} cannot be read as an .npz file: {error}") from error
    if not isinstance(data, np.lib.npyio.NpzFile):
        raise CollapseError(f"npz: {path} must be an .npz file, got a single array (.npy)")
    return data
