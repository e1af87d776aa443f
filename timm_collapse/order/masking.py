"""How many tokens are masked in a training step of a masked generator."""

from __future__ import annotations

import math

import torch

from .errors import CollapseError


def mask_rate(name: str, u: float, low: float = 0.7) -> float:
    """Share of masked tokens of a training step.

    Args:
        name: "truncnorm": MAR's, a normal around 1 with deviation .25, cut to [low, 1]; "cosine": that of a sampling
            step drawn uniformly, low + (1 - low) cos(pi u / 2); "uniform" in [low, 1].
        u: Uniform in [0, 1).
        low: The smallest rate; MAR's .7 means that at most 30% of the tokens are ever seen.

    Raises:
        CollapseError: An unknown name, or low outside [0, 1).
    """
    if not 0 <= low < 1:
        raise CollapseError(f"mask_ratio_min: must be in [0, 1), got {low}")
    if name == "truncnorm":
        normal = torch.distributions.Normal(1.0, 0.25)
        below = normal.cdf(torch.tensor(low, dtype=torch.float64))
        return float(normal.icdf(below + u * (0.5 - below)).clamp(low, 1.0))
    if name == "cosine":
        return low + (1 - low) * math.cos(math.pi / 2 * u)
    if name == "uniform":
        return low + (1 - low) * (1 - u)
    raise CollapseError(f"mask_ratio: must be truncnorm, cosine or uniform, got {name!r}")
