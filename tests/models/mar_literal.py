"""MAR's sampling loop and training loss written down literally, step by step as published, with no shortcut.

After Li et al., arXiv 2406.11838, and Nichol and Dhariwal, arXiv 2102.09672. Nothing here is shared with the package
but the modules that hold the weights: orders run from their end, what is masked is found by `nonzero`, both conditions
are a doubled batch with doubled states in the diffusion, the condition and the time are embedded at every diffusion
step, and every token is computed in every block.
"""

import math

import numpy as np
import torch

MAX_BETA, TRAINED_STEPS = 0.999, 1000


def diffusion_tables(num_steps: int = TRAINED_STEPS) -> dict[str, np.ndarray]:
    """Textbook coefficients (float64) of the process on num_steps of the 1000 steps; `timesteps` are their numbers."""

    def alpha_bar(x):
        return math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2

    n = TRAINED_STEPS
    betas = np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), MAX_BETA) for i in range(n)])
    alphas_cumprod = np.cumprod(1 - betas)
    timesteps, place = [], 0.0
    for _ in range(num_steps):  # a running sum, as published: it decides what halves are rounded to
        timesteps.append(round(place))
        place += (n - 1) / max(1, num_steps - 1)
    last, new_betas = 1.0, []
    for step in timesteps:
        new_betas.append(1 - alphas_cumprod[step] / last)
        last = alphas_cumprod[step]
    betas = np.array(new_betas)
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    bar_before = np.append(1.0, bar[:-1])
    variance = betas * (1 - bar_before) / (1 - bar)
    return {
        "timesteps": np.array(timesteps),
        "sqrt_bar": np.sqrt(bar),
        "sqrt_one_minus_bar": np.sqrt(1 - bar),
        "sqrt_recip_bar": np.sqrt(1 / bar),
        "sqrt_recipm1_bar": np.sqrt(1 / bar - 1),
        "log_beta": np.log(betas),
        "log_variance": np.log(np.append(variance[1] if num_steps > 1 else betas[0], variance[1:])),
        "of_start": betas * np.sqrt(bar_before) / (1 - bar),
        "of_noisy": (1 - bar_before) * np.sqrt(alphas) / (1 - bar),
    }


def network(net, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The diffusion head: x (n, C), t (n,) original steps, c (n, D) -> (n, 2 C)."""
    x = net.input_proj(x)
    half = 128
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
    angles = t[:, None].float() * frequencies[None]
    y = torch.nn.functional.silu(net.time_embed.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], -1).to(x.dtype))
                                 + net.cond_embed(c))  # fmt: skip
    for block in net.res_blocks:
        shift, scale, gate = block.adaLN_modulation[1](y).chunk(3, dim=-1)
        x = x + gate * block.mlp(block.in_ln(x) * (1 + scale) + shift)
    shift, scale = net.final_layer.adaLN_modulation[1](y).chunk(2, dim=-1)
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return net.final_layer.linear(x * (1 + scale) + shift)


def guided(net, x, t, c, scale):
    """Both halves of the batch see the state of the first half; the noise is guided, the variance is not."""
    half = x[: len(x) // 2]
    out = network(net, torch.cat([half, half]), t, c)
    eps, rest = out.chunk(2, dim=1)
    cond, uncond = eps.chunk(2)
    mixed = uncond + scale * (cond - uncond)
    return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)


def literal_diffusion(net, z, start, num_steps, scale, temperature, draw, bound=0.0):
    """DDPM with learned range.

    Args:
        z: (n, D); or (2 n, D) with guidance, which doubles the states.
        start: (n, C).
        draw: Gives the noise of a step (n, C).
        bound: If any, the token that a step predicts is clamped to +- bound.

    Returns:
        (n, C): the first half of doubled states.
    """
    doubled = len(z) == 2 * len(start)
    tables = {k: torch.from_numpy(v).to(start.device) for k, v in diffusion_tables(num_steps).items()}
    x = torch.cat([start, start]) if doubled else start
    for i in reversed(range(num_steps)):
        t = tables["timesteps"][i].expand(len(x))
        out = guided(net, x, t, z, scale) if doubled else network(net, x, t, z)
        eps, fraction = out.chunk(2, dim=1)
        at = {name: table[i] for name, table in tables.items()}
        fraction = (fraction.double() + 1) / 2
        log_variance = fraction * at["log_beta"] + (1 - fraction) * at["log_variance"]
        start_found = at["sqrt_recip_bar"] * x.double() - at["sqrt_recipm1_bar"] * eps.double()
        if bound:
            start_found = start_found.clamp(-bound, bound)
        mean = at["of_start"] * start_found + at["of_noisy"] * x.double()
        if i > 0:
            noise = draw()
            noise = torch.cat([noise, noise]) if doubled else noise
            mean = mean + torch.exp(0.5 * log_variance) * noise * temperature
        x = mean.float()
    return x[: len(start)]


def encode(mar, tokens, mask, condition):
    """tokens (B, L, C), mask (B, L) 1 where masked, condition (B, D) -> (B, buffer + visible, D)."""
    x = mar.z_proj(tokens)
    batch, _, width = x.shape
    x = torch.cat([torch.zeros(batch, mar.buffer_size, width, device=x.device, dtype=x.dtype), x], dim=1)
    mask = torch.cat([torch.zeros(batch, mar.buffer_size, device=x.device), mask], dim=1)
    x[:, : mar.buffer_size] = condition[:, None]
    x = mar.z_proj_ln(x + mar.encoder_pos_embed_learned)
    x = x[(1 - mask).nonzero(as_tuple=True)].reshape(batch, -1, width)
    for block in mar.encoder_blocks:
        x = block(x)
    return mar.encoder_norm(x)


def decode(mar, x, mask):
    """-> z (B, L, D_dec): all tokens, masked or not."""
    x = mar.decoder_embed(x)
    batch = len(x)
    mask = torch.cat([torch.zeros(batch, mar.buffer_size, device=x.device), mask], dim=1)
    padded = mar.mask_token.repeat(batch, mask.shape[1], 1).clone()
    padded[(1 - mask).nonzero(as_tuple=True)] = x.reshape(-1, x.shape[-1]).to(padded)
    x = padded + mar.decoder_pos_embed_learned
    for block in mar.decoder_blocks:
        x = block(x)
    return mar.decoder_norm(x)[:, mar.buffer_size :] + mar.diffusion_pos_embed_learned


def class_condition(mar, labels):
    """(B, D); a model without classes has one condition."""
    return mar.fake_latent.repeat(len(labels), 1) if mar.class_emb is None else mar.class_emb(labels)


@torch.no_grad()
def literal_generate(
    mar, labels, steps, guidance_scale, guidance_schedule, temperature, order_best_first, noise, generator
):
    """Latents (B, C, h, w) as the published loop makes them.

    Args:
        mar: A MAR in eval mode; its `num_sampling_steps` and `latent_bound` are taken.
        labels: (B,) long.
        guidance_schedule: "linear" or "constant".
        order_best_first: (B, L) long.
        noise: (B, L, C): what the diffusion of each token starts from.
        generator: For the noise of the diffusion steps. It is drawn as `MAR.generate` draws it, so that both see the
            same: with a temperature, for each iteration and each diffusion step but the last one normal noise
            (B count, C), sample by sample, the tokens of a sample in the order in which they are generated.
    """
    batch, length, channels = noise.shape
    device = noise.device
    orders = order_best_first.flip(1)  # generation runs from the end
    mask = torch.ones(batch, length, device=device)
    tokens = torch.zeros(batch, length, channels, device=device)
    double = guidance_scale != 1.0
    for step in range(steps):
        current = tokens.clone()
        condition, seen, hidden = class_condition(mar, labels), tokens, mask
        if double:
            condition = torch.cat([condition, mar.fake_latent.repeat(batch, 1)])
            seen, hidden = torch.cat([tokens, tokens]), torch.cat([mask, mask])
        z = decode(mar, encode(mar, seen, hidden, condition), hidden)

        ratio = np.cos(math.pi / 2.0 * (step + 1) / steps)
        mask_len = int(max(1, min(mask[0].sum().item() - 1, np.floor(length * ratio))))
        mask_next = torch.zeros(batch, length, device=device).scatter(1, orders[:, :mask_len], 1.0)
        to_predict = mask.bool() if step == steps - 1 else torch.logical_xor(mask.bool(), mask_next.bool())
        scale = guidance_scale
        if guidance_schedule == "linear":
            scale = 1 + (guidance_scale - 1) * (length - mask_len) / length
        places = to_predict.nonzero(as_tuple=True)
        first = length - int(mask[0].sum())
        wanted = order_best_first[:, first : first + int(to_predict[0].sum())]

        def draw(wanted=wanted, places=places):
            if temperature == 0:
                return torch.zeros(wanted.numel(), channels, device=device)
            drawn = torch.randn(wanted.numel(), channels, generator=generator, device=generator.device).to(device)
            canvas = torch.zeros(batch, length, channels, device=device)
            canvas[torch.arange(batch, device=device)[:, None], wanted] = drawn.view(batch, -1, channels)
            return canvas[places]

        z = z[(torch.cat([to_predict, to_predict]) if double else to_predict).nonzero(as_tuple=True)]
        current[places] = literal_diffusion(
            mar.diffloss.net, z, noise[places], mar.num_sampling_steps, scale, temperature, draw, mar.latent_bound
        )
        tokens, mask = current, mask_next
    return unpatchify(tokens, mar.patch_size)


def unpatchify(tokens, p):
    """(B, L, C p p) -> (B, C, h p, w p)."""
    batch, length, width = tokens.shape
    side, channels = math.isqrt(length), width // p**2
    x = tokens.reshape(batch, side, side, channels, p, p)
    return torch.einsum("nhwcpq->nchpwq", x).reshape(batch, channels, side * p, side * p)


def literal_loss(mar, latents, labels, mask, drop_label, t, noise):
    """Training loss, in float64 behind the network; every token is computed and the masked ones are weighted 1.

    Args:
        mask: (B, L) float, 1 where masked. drop_label: (B,) bool.
        t: (K B L,) long and noise (K B L, C): K draws a token.

    Returns:
        The loss of each token and draw (K B L,), and their mean over the masked ones.
    """
    p, channels = mar.patch_size, latents.shape[1]
    batch, side = len(latents), latents.shape[2] // p
    tokens = latents.reshape(batch, channels, side, p, side, p)
    tokens = torch.einsum("nchpwq->nhwcpq", tokens).reshape(batch, side * side, -1)
    drop = drop_label.float()[:, None]
    condition = drop * mar.fake_latent + (1 - drop) * class_condition(mar, labels)
    z = decode(mar, encode(mar, tokens, mask, condition), mask)
    draws = len(t) // mask.numel()
    target = tokens.reshape(-1, tokens.shape[-1]).repeat(draws, 1)
    z, weights = z.reshape(len(target) // draws, -1).repeat(draws, 1), mask.reshape(-1).repeat(draws).double()

    at = {name: torch.from_numpy(table)[t][:, None] for name, table in diffusion_tables().items()}
    noisy = at["sqrt_bar"] * target.double() + at["sqrt_one_minus_bar"] * noise.double()
    eps, fraction = network(mar.diffloss.net, noisy.float(), t, z).double().chunk(2, dim=1)
    mse = (noise.double() - eps).pow(2).mean(1)

    fraction = (fraction + 1) / 2
    log_variance = fraction * at["log_beta"] + (1 - fraction) * at["log_variance"]
    start = at["sqrt_recip_bar"] * noisy - at["sqrt_recipm1_bar"] * eps.detach()
    mean = at["of_start"] * start + at["of_noisy"] * noisy
    true_mean, true_log = at["of_start"] * target.double() + at["of_noisy"] * noisy, at["log_variance"]
    kl = -1 + log_variance - true_log + torch.exp(true_log - log_variance)
    kl = 0.5 * (kl + (true_mean - mean) ** 2 * torch.exp(-log_variance)).mean(1)
    nll = -discretized_log_likelihood(target.double(), mean, 0.5 * log_variance).mean(1)
    loss = mse + torch.where(t == 0, nll, kl) / math.log(2.0)
    return loss, (loss * weights).sum() / weights.sum()


def discretized_log_likelihood(x, means, log_scales):
    """Of 256 levels in [-1, 1]."""

    def cdf(y):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    above = cdf(torch.exp(-log_scales) * (x - means + 1 / 255))
    below = cdf(torch.exp(-log_scales) * (x - means - 1 / 255))
    log_above, log_rest = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    log_bin = (above - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_above, torch.where(x > 0.999, log_rest, log_bin))
