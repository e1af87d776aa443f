"""A small MAR for tests, read by them with `runpy`."""

import torch

from timm_collapse.models import MAR

SMALL = {
    "img_size": 8, "vae_stride": 2, "encoder_embed_dim": 32, "encoder_depth": 2, "encoder_num_heads": 4,
    "decoder_embed_dim": 48, "decoder_depth": 3, "decoder_num_heads": 3, "vae_embed_dim": 4, "class_num": 5,
    "buffer_size": 3, "diffloss_d": 2, "diffloss_w": 40, "num_sampling_steps": 4, "diffusion_batch_mul": 2,
    "mlp_ratio": 2.0, "attn_dropout": 0.0, "proj_dropout": 0.0,
}  # fmt: skip
"""16 tokens of 4 channels; no two widths or depths are equal."""


def random_mar(**changes) -> MAR:
    """In eval mode, all of its parameters random: as initialised, the head gives zeros."""
    mar = MAR(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in mar.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return mar
