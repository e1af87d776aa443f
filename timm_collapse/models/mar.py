"""MAR: masked autoregressive image generation with a diffusion head, weight-compatible with the published models.

Li et al., "Autoregressive Image Generation without Vector Quantization", NeurIPS 2024 (arXiv 2406.11838). Orders are
best first everywhere: the first patches of an order are generated first, and in training they are the visible ones.
CMAR is the same network, trained and sampled along collapse orders (Guo et al., arXiv 2511.22281, section 5).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..order import ClassOrderBank, CollapseError
from ..order.bank import check_labels
from ..order.errors import describe
from ..order.masking import mask_rate
from .codec import PixelCodec, VaeCodec, load_codec
from .diffusion import DiffusionHead
from .diffusion_process import NUM_TIMESTEPS
from .mar_generate import GenerateMixin
from .tokenizer import patchify, unpatchify
from .transformer import gather_tokens, run_block_for, run_blocks, scatter_tokens

_layer_norm = partial(nn.LayerNorm, eps=1e-6)


class MAR(GenerateMixin, nn.Module):
    """Encoder of the visible tokens, decoder of all of them, diffusion head for the masked ones.

    Args:
        img_size: Image side in pixels.
        vae_stride: Pixels per latent position a side (1: no VAE, the latents are pixels).
        patch_size: Latent positions per token a side.
        encoder_embed_dim, encoder_depth, encoder_num_heads: Encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: Decoder.
        mlp_ratio: Hidden width of the blocks' MLPs over their width.
        vae_embed_dim: Channels of the latents.
        class_num: Number of classes, 0 for an unconditional model.
        buffer_size: Copies of the class embedding before the tokens.
        label_drop_prob: Share of training samples that see no label, for guidance.
        attn_dropout, proj_dropout: Of the blocks.
        diffloss_d, diffloss_w: Residual blocks and width of the diffusion head.
        num_sampling_steps: Diffusion steps of `generate`, as an int or its text.
        diffusion_batch_mul: Noise levels drawn for each token and training step.
        grad_checkpointing: Recompute the blocks in the backward pass.
        vae: Where the codec between latents and pixels is from: "pixels", a folder or a Hub id (`load_codec`).
        vae_scale: Factor on the VAE's latents (see `latent_scale`), 0 for the VAE's own.
        latent_bound: Largest absolute value of a latent, for sampling, where it is known (pixels); 0 for none.

    Attributes:
        grid: Token grid (h, w). seq_len: number of tokens L. token_dim: their channels.
        bank: `ClassOrderBank` that generation orders come from by default, or None.
    """

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 768,
        encoder_depth: int = 12,
        encoder_num_heads: int = 12,
        decoder_embed_dim: int = 768,
        decoder_depth: int = 12,
        decoder_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        vae_embed_dim: int = 16,
        class_num: int = 1000,
        buffer_size: int = 64,
        label_drop_prob: float = 0.1,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        diffloss_d: int = 6,
        diffloss_w: int = 1024,
        num_sampling_steps: int | str = 100,
        diffusion_batch_mul: int = 4,
        grad_checkpointing: bool = False,
        vae: str = "xwen99/mar-vae-kl16",
        vae_scale: float = 0.0,
        latent_bound: float = 0.0,
    ):
        super().__init__()
        side, rest = divmod(img_size, vae_stride * patch_size)
        if rest or side < 1:
            raise CollapseError(f"img_size: must be a multiple of vae_stride * patch_size={vae_stride * patch_size}, "
                                f"got {img_size}")  # fmt: skip
        for name, low in (("class_num", 0), ("buffer_size", 1), ("diffusion_batch_mul", 1)):
            if locals()[name] < low:
                raise CollapseError(f"{name}: must be at least {low}, got {locals()[name]}")
        self.img_size, self.patch_size, self.vae_embed_dim = img_size, patch_size, vae_embed_dim
        self.vae, self.vae_scale = vae, vae_scale
        self.grid, self.seq_len = (side, side), side * side
        self.token_dim = vae_embed_dim * patch_size**2
        self.num_classes, self.buffer_size, self.label_drop_prob = class_num, buffer_size, label_drop_prob
        self.num_sampling_steps, self.diffusion_batch_mul = int(num_sampling_steps), diffusion_batch_mul
        self.grad_checkpointing, self.latent_bound = grad_checkpointing, latent_bound
        self.bank: ClassOrderBank | None = None

        def blocks(depth: int, dim: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim, heads, mlp_ratio, qkv_bias=True, proj_drop=proj_dropout, attn_drop=attn_dropout,
                      norm_layer=_layer_norm)
                for _ in range(depth)
            )  # fmt: skip

        width, decoder_width, length = encoder_embed_dim, decoder_embed_dim, self.seq_len + buffer_size
        self.class_emb = nn.Embedding(class_num, width) if class_num else None
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(self.token_dim, width), _layer_norm(width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = blocks(encoder_depth, width, encoder_num_heads)
        self.encoder_norm = _layer_norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = blocks(decoder_depth, decoder_width, decoder_num_heads)
        self.decoder_norm = _layer_norm(decoder_width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, decoder_width))
        self._init_weights()
        self.diffloss = DiffusionHead(self.token_dim, decoder_width, diffloss_w, diffloss_d)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    # -- tokens --------------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents of one image."""
        return self.vae_embed_dim, self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> tokens (B, L, token_dim): channels in the order c p q, positions row by row."""
        return patchify(latents, self.patch_size)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Inverse of `patchify`."""
        return unpatchify(tokens, self.grid, self.patch_size)

    def check_latents(self, latents: Tensor) -> None:
        """Raises CollapseError unless latents are finite floats of shape (B, *latent_shape)."""
        if not isinstance(latents, Tensor) or latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent_shape:
            raise CollapseError(f"latents: must be of shape (B, {', '.join(map(str, self.latent_shape))}), "
                                f"got {describe(latents)}")  # fmt: skip
        if not latents.is_floating_point() or not latents.isfinite().all():
            raise CollapseError(
                f"latents: must be finite floating point, got {latents.dtype} with NaN or inf or no float"
            )

    def check_labels(self, labels: Tensor, batch: int | None = None) -> None:
        """Raises CollapseError unless labels are (B,) ints in [0, num_classes); an unconditional model takes any."""
        check_labels(labels, self.num_classes or None)
        if batch is not None and len(labels) != batch:
            raise CollapseError(f"labels: must be {batch}, one a sample, got {len(labels)}")

    def class_condition(self, labels: Tensor) -> Tensor:
        """(B,) long -> (B, D); an unconditional model has one condition for all."""
        if self.class_emb is None:
            return self.fake_latent.expand(len(labels), -1)
        return self.class_emb(labels)

    # -- network -------------------------------------------------------------------------------------------------------

    def forward_encoder(self, tokens: Tensor, visible: Tensor, condition: Tensor) -> Tensor:
        """Encode the visible tokens.

        Args:
            tokens: (B, v, token_dim): the visible tokens.
            visible: (B, v) long: their positions.
            condition: (B, D): class embeddings.

        Returns:
            (B, buffer + v, D).
        """
        buffer, places = self.encoder_pos_embed_learned.split([self.buffer_size, self.seq_len], dim=1)
        x = self.z_proj(tokens.to(self.z_proj.weight.dtype)) + places[0][visible]
        x = self.z_proj_ln(torch.cat([(condition.unsqueeze(1) + buffer).to(x.dtype), x], dim=1))
        return self.encoder_norm(self._run(self.encoder_blocks, x))

    def forward_decoder(self, encoded: Tensor, visible: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Conditions of the tokens.

        Args:
            encoded: (B, buffer + v, D), from `forward_encoder`.
            visible: (B, v) long.
            wanted: (B, k) long: the positions whose conditions are needed; None: all L, in their order.

        Returns:
            z (B, k or L, D_dec).
        """
        buffer, tokens = self.decoder_embed(encoded).split([self.buffer_size, visible.shape[1]], dim=1)
        canvas = self.mask_token.to(tokens.dtype).expand(len(tokens), self.seq_len, -1)
        x = torch.cat([buffer, scatter_tokens(tokens, visible, canvas)], dim=1) + self.decoder_pos_embed_learned
        if wanted is None or self.training:
            x = self.decoder_norm(self._run(self.decoder_blocks, x))[:, self.buffer_size :]
            x = x + self.diffusion_pos_embed_learned
            return x if wanted is None else gather_tokens(x, wanted)
        x = self._run(self.decoder_blocks[:-1], x)
        x = self.decoder_norm(run_block_for(self.decoder_blocks[-1], x, wanted + self.buffer_size))
        return x + self.diffusion_pos_embed_learned[0][wanted]

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return run_blocks(blocks, x, self.grad_checkpointing and self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch."""
        self.grad_checkpointing = enable

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        labels: Tensor,
        order: Tensor | None = None,
        num_masked: int | None = None,
        drop_label: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        num_predicted: int | None = None,
    ) -> dict[str, Tensor]:
        """Training loss.

        Args:
            latents: (B, C, h, w), of about unit variance.
            labels: (B,) long.
            order: (B, L) long, best first: the last `num_masked` are masked. Random by default.
            num_masked: In [1, L]; by default from MAR's distribution (`mask_rate`).
            drop_label: (B,) bool; by default drawn with `label_drop_prob`.
            t: (diffusion_batch_mul, B, num_predicted) long: time steps; by default drawn.
            noise: (diffusion_batch_mul, B, num_predicted, token_dim); by default drawn.
            num_predicted: The loss is of so many masked tokens, those that come next in the order; by default of all.
                Where orders depend on the image, what is masked last is what is easy to tell: a model that learns all
                masked tokens alike then takes the next ones for too smooth.

        Returns:
            loss, the mean over the predicted tokens, and its parts: `mse` of the noise and `bound` in bits.

        Raises:
            CollapseError: For arguments of other shapes or ranges.
        """
        self.check_latents(latents)
        self.check_labels(labels, len(latents))
        batch, device = len(latents), latents.device
        if order is None:
            order = torch.rand(batch, self.seq_len, device=device).argsort(1)
        elif tuple(order.shape) != (batch, self.seq_len):
            raise CollapseError(f"order: must be of shape {(batch, self.seq_len)}, got {describe(order)}")
        if num_masked is None:
            num_masked = math.ceil(self.seq_len * mask_rate("truncnorm", torch.rand(()).item()))
        if not 1 <= num_masked <= self.seq_len:
            raise CollapseError(f"num_masked: must be in [1, {self.seq_len}], got {num_masked}")
        num_predicted = num_masked if num_predicted is None else num_predicted
        if not 1 <= num_predicted <= num_masked:
            raise CollapseError(f"num_predicted: must be in [1, num_masked={num_masked}], got {num_predicted}")
        if drop_label is None:
            drop_label = torch.rand(batch, device=device) < self.label_drop_prob
        shape = (self.diffusion_batch_mul, batch, num_predicted)
        for name, value, wanted in (("t", t, shape), ("noise", noise, (*shape, self.token_dim))):
            if value is not None and tuple(value.shape) != wanted:
                raise CollapseError(f"{name}: must be of shape {wanted}, got {describe(value)}")
        visible = order[:, : self.seq_len - num_masked].sort(1).values
        masked = order[:, self.seq_len - num_masked :][:, :num_predicted]
        tokens = self.patchify(latents)
        condition = torch.where(drop_label[:, None], self.fake_latent, self.class_condition(labels))
        z = self.forward_decoder(
            self.forward_encoder(gather_tokens(tokens, visible), visible, condition), visible, masked
        )
        target = gather_tokens(tokens, masked).expand(*shape, -1)
        t = torch.randint(NUM_TIMESTEPS, shape, device=device) if t is None else t
        noise = torch.randn_like(target) if noise is None else noise
        mse, bound = self.diffloss(target, z.expand(*shape, -1), t, noise)
        return {"loss": (mse + bound).mean(), "mse": mse.mean().detach(), "bound": bound.mean().detach()}

    # -- what travels with a checkpoint --------------------------------------------------------------------------------

    def codec(self) -> PixelCodec | VaeCodec:
        """Between images in [0, 1] and the latents of this model; loads its VAE."""
        return load_codec(self.vae, self.vae_scale or None)

    def load_bank(self, path: str | Path) -> MAR:
        """Take the order bank of a file; its grid is resampled to the model's."""
        self.bank = ClassOrderBank.load(path).resample(self.grid)
        return self
