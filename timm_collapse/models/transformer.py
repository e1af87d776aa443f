"""The one transformer of the package: timm's EvaBlock with axial RoPE, on whole grids or a subset of the tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Transformer(nn.Module):
    """Pre-norm transformer blocks with axial rotary positions counted in patches.

    Positions are relative, so one set of weights serves any grid.

    Args:
        dim: Token width.
        depth: Number of blocks.
        head_dim: Width of an attention head, a multiple of 4.
        num_prefix_tokens: Leading tokens without a position (class or target tokens).
    """

    def __init__(self, dim: int, depth: int, head_dim: int = 32, num_prefix_tokens: int = 0):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim must be a multiple of head_dim, got dim={dim}, head_dim={head_dim}")
        self.rope = RotaryEmbeddingCat(head_dim, temperature=100.0, in_pixels=False)
        self.blocks = nn.ModuleList(
            EvaBlock(dim, dim // head_dim, num_prefix_tokens=num_prefix_tokens) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: tuple[int, int], index: Tensor | None = None) -> Tensor:
        """Rotary table of a grid, (N, 2 head_dim), or of each image's tokens `index` (B, k), (B, 1, k, 2 head_dim)."""
        table = self.rope.get_embed(list(grid))
        return table if index is None else table[index].unsqueeze(1)

    def forward(self, x: Tensor, grid: tuple[int, int], index: Tensor | None = None) -> Tensor:
        """(B, prefix + N or k, dim) -> the same shape."""
        return self.norm(self.run(x, grid, index))

    def run(
        self, x: Tensor, grid: tuple[int, int], index: Tensor | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Blocks start to stop alone, without the last norm."""
        rope = self.positions(grid, index)
        for block in self.blocks[start:stop]:
            x = block(x, rope=rope)
        return x


class PlainTransformer(nn.Module):
    """timm's plain ViT blocks on one grid, with a learned bias of attention for each pair of tokens.

    That takes half the operations of rotary positions.

    Args:
        dim: Token width, a multiple of 32, the width of an attention head.
        depth: Number of blocks.
        num_tokens: Tokens of the grid.
    """

    def __init__(self, dim: int, depth: int, num_tokens: int):
        super().__init__()
        if dim % 32:
            raise ValueError(f"dim must be a multiple of 32, got {dim}")
        self.blocks = nn.ModuleList(Block(dim, dim // 32, qkv_bias=True) for _ in range(depth))
        self.biases = nn.Parameter(torch.zeros(depth, 1, dim // 32, num_tokens, num_tokens))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def run(self, x: Tensor, grid: tuple[int, int], start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks start to stop alone, without the last norm."""
        # fused attention takes no bias that asks for a gradient
        biases = self.biases if torch.is_grad_enabled() else self.biases.detach()
        for block, bias in zip(self.blocks[start:stop], biases[start:stop]):
            x = block(x, attn_mask=bias)
        return x


def use_plain_attention(model: nn.Module) -> None:
    """Matmul and softmax instead of fused attention: .6 of the time of a small ViT's bf16 training step on CPU."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def border_distances(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(N, 4): closeness 1 / (1 + d) of each patch to the top, bottom, left and right border, d in patches."""
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    cols = torch.arange(grid[1], device=device).repeat(grid[0])
    d = torch.stack([rows, grid[0] - 1 - rows, cols, grid[1] - 1 - cols], -1)
    return 1.0 / (1.0 + d)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D), (B, k) -> (B, k, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: Tensor, index: Tensor, into: Tensor) -> Tensor:
    """A copy of `into` (B, N, D) with x (B, k, D) at the places `index` (B, k)."""
    return into.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x.to(into.dtype))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool = False) -> Tensor:
    """One block after the other; `recompute`: keep no activations inside them, but run them again in the backward."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
    return x


def run_block_for(block: Block, x: Tensor, wanted: Tensor) -> Tensor:
    """timm's ViT block on x (B, N, D), for the tokens `wanted` (B, k) alone: they attend to all."""
    attn = block.attn
    batch, length, width = x.shape
    heads = attn.num_heads
    normed = block.norm1(x)
    weights, biases = attn.qkv.weight.split([width, 2 * width]), attn.qkv.bias.split([width, 2 * width])
    q = F.linear(gather_tokens(normed, wanted), weights[0], biases[0])
    q = q.view(batch, -1, heads, width // heads).transpose(1, 2)
    k, v = F.linear(normed, weights[1], biases[1]).view(batch, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = gather_tokens(x, wanted) + attn.proj(mixed)
    return x + block.mlp(block.norm2(x))


def init_weights(module: nn.Module) -> None:
    """Truncated-normal linear layers with zero bias, as in ViT and MAE."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for name, p in module.named_parameters():
        if name.endswith("_token"):
            nn.init.trunc_normal_(p, std=0.02)
