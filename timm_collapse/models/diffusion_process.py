"""The Gaussian diffusion process of MAR's head: coefficients, losses, noise. Tensors in, tensors out.

Nichol and Dhariwal, "Improved DDPM", ICML 2021: cosine schedule, predicted noise, learned variance between its two
bounds.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..order import CollapseError

NUM_TIMESTEPS = 1000
MAX_BETA = 0.999


class GaussianDiffusion:
    """Coefficients of a forward process and its reverse steps, on some of the 1000 original time steps.

    Args:
        num_steps: How many of them, evenly from 0 to 999 inclusive; 1000 is the process that is trained on.

    Attributes:
        timesteps: (num_steps,) long: the original number of each step, which the network is told.
        rows: For every step, as numbers: square roots of alpha_bar and of 1 - alpha_bar, factors of x_0 and x_t in the
            mean of x_{t-1}, and the bounds of its log variance.
    """

    def __init__(self, num_steps: int = NUM_TIMESTEPS):
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 2 <= num_steps <= NUM_TIMESTEPS:
            raise CollapseError(f"diffusion_steps: must be an int in [2, {NUM_TIMESTEPS}], got {num_steps!r}")
        self.num_steps = num_steps
        # a sum of strides, rounded as Python does: that is how the reference respaces
        stride = (NUM_TIMESTEPS - 1) / (num_steps - 1)
        places, at = [], 0.0
        for _ in range(num_steps):
            places.append(round(at))
            at += stride
        self.timesteps = torch.tensor(places)
        kept = _cosine_alphas_cumprod()[self.timesteps]
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        betas = 1 - kept / before
        variance = betas * (1 - before) / (1 - kept)  # of the posterior q(x_{t-1} | x_t, x_0)
        # at step 0 the variance is 0: its logarithm is that of the next step
        self.tables = torch.stack(
            [
                kept.sqrt(),
                (1 - kept).sqrt(),
                betas * before.sqrt() / (1 - kept),  # posterior mean: factor of x_0
                (1 - before) * (1 - betas).sqrt() / (1 - kept),  # and of x_t
                torch.cat([variance[1:2], variance[1:]]).log(),
                betas.log(),
            ]
        )
        self._on: dict[torch.device, Tensor] = {}
        self.rows = [tuple(row) for row in self.tables.T.tolist()]

    def previous_mean(self, x: Tensor, eps: Tensor, step: int, bound: float = 0.0) -> Tensor:
        """Mean of x_{t-1} from x_t and the predicted noise; the x_0 that they mean is clamped to +- bound, if any."""
        signal, spread, of_start, of_noisy, _, _ = self.rows[step]
        if bound:
            return of_start * ((x - spread * eps) / signal).clamp(-bound, bound) + of_noisy * x
        # folded in float64: at the noisy end 1 / signal is 10^4, and float32 would cancel
        return (of_start / signal + of_noisy) * x - (of_start * spread / signal) * eps

    def at(self, t: Tensor) -> Tensor:
        """(6, ..., 1) float32: the rows of `tables` at steps t, to be unpacked and broadcast over channels."""
        if t.device not in self._on:
            self._on[t.device] = self.tables.to(t.device, torch.float32)
        return self._on[t.device][:, t].unsqueeze(-1)

    def losses(self, out: Tensor, target: Tensor, noisy: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token.

        Args:
            out: (..., 2 C) of the network: predicted noise, and where the log variance lies between its bounds (-1, 1).
            target, noisy, noise: (..., C): x_0, x_t and the noise between them.
            t: (...) long.

        Returns:
            Mean squared error of the noise, and the variational bound in bits a dimension, which teaches the variance
            alone (the predicted noise is detached in it); both (...), float32.
        """
        eps, fraction = out.float().chunk(2, dim=-1)
        mse = (noise - eps).square().mean(-1)
        signal, spread, of_start, of_noisy, low, high = self.at(t)
        start = (noisy - spread * eps.detach()) / signal
        log_variance = low + (fraction + 1) / 2 * (high - low)
        mean, true_mean = (of_start * x + of_noisy * noisy for x in (start, target))
        kl = 0.5 * (log_variance - low + (low - log_variance).exp() - 1)
        kl = kl + 0.5 * (true_mean - mean).square() * (-log_variance).exp()
        nll = -_discretized_log_likelihood(target, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)
        return mse, bound

    def add_noise(self, target: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from x_0 (..., C), noise (..., C) and t (...)."""
        signal, spread, *_ = self.at(t)
        return signal * target + spread * noise


@lru_cache(maxsize=64)
def schedule(num_steps: int) -> GaussianDiffusion:
    """The process on `num_steps` steps, made once."""
    return GaussianDiffusion(num_steps)


def _cosine_alphas_cumprod() -> Tensor:
    def alpha_bar(x: float) -> float:
        return math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2

    n = NUM_TIMESTEPS
    betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), MAX_BETA) for i in range(n)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x; the outermost bins reach to infinity."""

    def cdf(y: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    inverse = torch.exp(-log_scale)
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp_min(1e-12).log()


def draw_normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Float32 noise from a generator on any device; torch's own without one."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
