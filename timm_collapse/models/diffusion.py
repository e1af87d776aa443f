"""The diffusion head of MAR: a small MLP that draws one continuous token, given what the transformer says about it.

Li et al., "Autoregressive Image Generation without Vector Quantization", NeurIPS 2024 (arXiv 2406.11838), section 3.
Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion_process import NUM_TIMESTEPS, draw_normal, schedule

MODULATED_ROWS = 4096  # of a large matrix product instead of many small ones; bounds its memory
FREQUENCIES = 256


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
