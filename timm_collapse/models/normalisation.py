"""Normalisation of images, and the way from one model's to another's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from ..order import CollapseError
from ..order.constants import constant
from ..order.errors import describe


@dataclass(frozen=True)
class Normalisation:
    """What a model expects of pixels in [0, 1]: (pixels - mean) / std, per channel.

    Args:
        mean, std: One number for all channels, or one a channel; std positive.

    Raises:
        CollapseError: Anything else.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise CollapseError(f"std must be positive, got {self.std}")
        channels = max(len(self.mean), len(self.std))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _broadcast(getattr(self, name), channels))

    @classmethod
    def of(cls, source: object) -> Normalisation:
        """That of an orderer or codec (anything with `mean` and `std`), or of a `pretrained_cfg`."""
        if isinstance(source, Mapping):
            return cls(source["mean"], source["std"])
        return cls(source.mean, source.std)

    def for_channels(self, channels: int) -> Normalisation:
        """The same for images of so many channels.

        Raises:
            CollapseError: It has another number of them, and more than one.
        """
        return Normalisation(_broadcast(self.mean, channels), _broadcast(self.std, channels))

    def grey(self) -> Normalisation:
        """One value for all channels: the averages of mean and std."""
        return Normalisation(*((sum(values) / len(values),) for values in (self.mean, self.std)))

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) or (C, H, W) in [0, 1] -> images, normalised."""
        return (pixels - _column(self.mean, pixels)) / _column(self.std, pixels)

    def undo(self, images: Tensor) -> Tensor:
        """Normalised images -> pixels in [0, 1]; the inverse of `apply`."""
        return images * _column(self.std, images) + _column(self.mean, images)

    def to(self, other: Normalisation, images: Tensor) -> Tensor:
        """Images in this normalisation -> the same images in another one.

        Where one of the two has several channels and the images have one, the result has several: grey as RGB.
        """
        a, b = (self, other) if len(self.mean) == len(other.mean) else (self._plain(), other._plain())
        channels = max(len(a.mean), len(b.mean))
        a, b = a.for_channels(channels), b.for_channels(channels)
        if a == b:
            return images
        scale = tuple(own / new for own, new in zip(a.std, b.std))
        shift = tuple((own - new) / std for own, new, std in zip(a.mean, b.mean, b.std))
        return images * _column(scale, images) + _column(shift, images)

    def _plain(self) -> Normalisation:
        """The same with one value, where all channels have the same."""
        same = len(set(self.mean)) == len(set(self.std)) == 1
        return Normalisation(self.mean[:1], self.std[:1]) if same else self


def _numbers(name: str, values: object) -> tuple[float, ...]:
    given = values
    if isinstance(values, Real):
        values = (values,)
    elif isinstance(values, Tensor):
        values = values.flatten().tolist()
    values = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else ()
    if not values or not all(isinstance(value, Real) and isfinite(value) for value in values):
        raise CollapseError(f"{name} must be one finite number, or one a channel, got {describe(given)}")
    return tuple(float(value) for value in values)


def _broadcast(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise CollapseError(
            f"mean and std must be one number each, or one for each of the {channels} channels, got {values}"
        )
    return values * (channels // len(values))


def _column(values: tuple[float, ...], images: Tensor) -> float | Tensor:
    """One value a channel, to compute with (..., C, H, W): a number where all are the same, else (C, 1, 1)."""
    if len(set(values)) == 1:
        return values[0]
    return constant(_tensor, values, images.dtype, device=images.device)


def _tensor(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1)
