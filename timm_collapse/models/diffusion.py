"""The diffusion head of MAR: a small MLP that draws one continuous token, given what the transformer says about it.

Li et al., "Autoregressive Image Generation without Vector Quantization", NeurIPS 2024 (arXiv 2406.11838), section 3;
the process is that of Nichol and Dhariwal, "Improved DDPM", ICML 2021: cosine schedule, predicted noise, learned
variance between its two bounds. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..order import CollapseError

NUM_TIMESTEPS = 1000
MAX_BETA = 0.999
MODULATED_ROWS = 4096  # of a large matrix product instead of many small ones; bounds its memory
FREQUENCIES = 256


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


class TimeEmbedding(nn.Module):
    """Sinusoids of the time step, then two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(...) -> (..., width)."""
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t.float().unsqueeze(-1) * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """Residual MLP whose normalisation and gate are set by the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (..., W), modulation (..., 3 W) = `adaLN_modulation(condition)`."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate.to(x.dtype) * self.mlp(self.in_ln(x) * (1 + scale) + shift).to(x.dtype)


class FinalLayer(nn.Module):
    """Modulated normalisation and projection."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (..., W), modulation (..., 2 W)."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class NoisePredictor(nn.Module):
    """From a noisy token, its time step and its condition to the noise and the place of the log variance.

    Args:
        channels: Token channels C.
        cond_dim: Width of the condition z.
        width, depth: Width W and number of residual blocks.
    """

    def __init__(self, channels: int, cond_dim: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[2].weight, std=0.02)
        for module in [*(block.adaLN_modulation[1] for block in self.res_blocks),
                       self.final_layer.adaLN_modulation[1], self.final_layer.linear]:  # fmt: skip
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x (..., C), t (...) long, z (..., cond_dim) -> (..., 2 C)."""
        return self.from_modulations(self.project(x), self.modulations(self.time_embed(t) + self.cond_embed(z)))

    def project(self, x: Tensor) -> Tensor:
        """Noisy tokens, which are float32, to the width and precision of the network."""
        return self.input_proj(x.to(self.input_proj.weight.dtype))

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """What the summed embeddings (..., W) say to each block and to the last layer: (..., 3 W) and (..., 2 W)."""
        condition = F.silu(condition)
        return [layer.adaLN_modulation[1](condition) for layer in (*self.res_blocks, self.final_layer)]

    def from_modulations(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """The rest of the network, which alone sees the noisy tokens: projected ones (..., W) -> (..., 2 C)."""
        x = x.float() if x.dtype == torch.float16 else x  # the residual sum leaves fp16's range first
        for block, modulation in zip(self.res_blocks, modulations):
            x = block(x, modulation)
        return self.final_layer(x, modulations[-1])


class DiffusionHead(nn.Module):
    """Loss and sampling of continuous tokens (`diffloss` in the checkpoints).

    Args:
        channels: Token channels C.
        cond_dim: Width of the condition z.
        width, depth: Of the MLP.
    """

    def __init__(self, channels: int, cond_dim: int, width: int, depth: int):
        super().__init__()
        self.channels = channels
        self.net = NoisePredictor(channels, cond_dim, width, depth)

    def forward(self, target: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token: target (..., C), z (..., cond_dim), t (...) long, noise (..., C) -> `losses`."""
        process = schedule(NUM_TIMESTEPS)
        target, noise = target.float(), noise.float()
        noisy = process.add_noise(target, noise, t)
        out = self.net(noisy, t, z)
        with torch.autocast(out.device.type, enabled=False):
            return process.losses(out, target, noisy, noise, t)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        start: Tensor,
        num_steps: int,
        guidance_scale: float = 1.0,
        z_uncond: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        bound: float = 0.0,
    ) -> Tensor:
        """Draw tokens.

        What does not change over the steps is computed once: the embedding of the conditions and of the time steps.
        With guidance there is one state for each token, seen by both conditions.

        Args:
            z: (n, cond_dim) conditions.
            start: (n, C): the noise that the process starts from.
            num_steps: Steps of the respaced process.
            guidance_scale: The noise is uncond + scale (cond - uncond); the variance is the conditional one.
            z_uncond: (n, cond_dim), needed for a guidance scale other than 1.
            temperature: Factor on the noise of each step (not on `start`).
            generator: For that noise.
            bound: Largest absolute value of a token, where it is known (pixels); 0 for none, as published. The cosine
                schedule multiplies errors at its noisy end by 10^3, which a small or short-trained network cannot bear.

        Returns:
            (n, C) float32.
        """
        process, guided = schedule(num_steps), z_uncond is not None
        conditions = self.net.cond_embed(torch.cat([z, z_uncond]) if guided else z)
        times = self.net.time_embed(process.timesteps.to(z.device))
        x, group = start.float(), max(1, MODULATED_ROWS // len(conditions))
        for i in reversed(range(num_steps)):
            if (num_steps - 1 - i) % group == 0:  # the modulations do not depend on x: those of several steps at once
                first = max(0, i - group + 1)
                several = self.net.modulations(conditions + times[first : i + 1].unsqueeze(1))
            projected = self.net.project(x)
            projected = torch.cat([projected, projected]) if guided else projected
            out = self.net.from_modulations(projected, [each[i - first] for each in several])
            eps, fraction = out.float().chunk(2, dim=-1)
            if guided:
                (eps, eps_uncond), fraction = eps.chunk(2), fraction.chunk(2)[0]
                eps = eps_uncond + guidance_scale * (eps - eps_uncond)
            x = process.previous_mean(x, eps, i, bound)
            if i and temperature:
                noise = draw_normal(x.shape, generator, x.device)
                low, high = process.rows[i][4:]
                x = x + temperature * torch.exp(0.5 * (low + (high - low) * (fraction + 1) / 2)) * noise
        return x


def draw_normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Float32 noise from a generator on any device; torch's own without one."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
