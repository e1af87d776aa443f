"""Token merging (ToMe, Bolya et al. 2023, arXiv:2210.09461) on timm's VisionTransformer, to compare CViT with.

Between attention and MLP of every block, the r most similar pairs of tokens become one: tokens alternate between two
sets, each token of the first set proposes the most similar one of the second, and the r best proposals are merged by
size-weighted averages. Attention adds the logarithm of each token's size, so that a merged token counts as often as the
patches it stands for. Training-free, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from timm_collapse import CollapseError
from timm_collapse.evaluation import count_macs


def match_tokens(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching; token 0 is the class token, which is never merged away and takes none in.

    Args:
        metric: (B, N, d), what similarity is measured in: the keys, averaged over heads.
        r: Merges, in [0, (N - 1) // 2]: more are cut to that.

    Returns:
        Three long tensors: (B, r) the even token that each merge moves, best first; (B, r) the odd token that takes it
        in; (B, ceil(N / 2) - r) the even tokens that stay, ascending. Even and odd tokens are counted apart, from 0.
    """
    r = min(r, (metric.shape[1] - 1) // 2)
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    best, target = scores.max(-1)
    best[:, 0] = -torch.inf  # the class token moves nowhere; it is even, so that nothing moves to it
    proposals = best.argsort(dim=1, descending=True, stable=True)
    moved, stay = proposals[:, :r], proposals[:, r:].sort(1).values
    return moved, target.gather(1, moved), stay


def merge_tokens(x: Tensor, size: Tensor, match: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge matched tokens by size-weighted averages.

    Args:
        x: (B, N, D) tokens.
        size: (B, N, 1), how many patches each token stands for.
        match: From `match_tokens`.

    Returns:
        Tokens (B, N - r, D) and their sizes: the even ones that stay, then the odd ones.
    """
    moved, target, stay = match

    def merge(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        odd = odd.scatter_add(1, _wide(target, values), even.gather(1, _wide(moved, values)))
        return torch.cat([even.gather(1, _wide(stay, values)), odd], 1)

    total = merge(size)
    return merge(x * size.to(x.dtype)) / total.to(x.dtype), total


def _wide(index: Tensor, values: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, values.shape[-1])


def attend(attention: Attention, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """timm's attention with the log size of each key added to its scores; also the keys' mean over heads (B, N, d)."""
    b, n, _ = x.shape
    qkv = attention.qkv(x).reshape(b, n, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    bias = None if size is None else size.log().view(b, 1, 1, n).to(q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    x = attention.norm(x.transpose(1, 2).reshape(b, n, attention.attn_dim))
    return attention.proj(x), k.mean(1)


class TokenMerging(nn.Module):
    """A ViT that merges tokens, for inference; it shares the model's weights and leaves the model as it is.

    Args:
        model: A timm `VisionTransformer` with one class token, which the head reads, and timm's own blocks.
        r: Merges in each block, one number for all or one for each.

    Raises:
        CollapseError: Another model, or numbers that do not fit its depth.
    """

    def __init__(self, model: VisionTransformer, r: int | Sequence[int]):
        super().__init__()
        if not isinstance(model, VisionTransformer) or model.num_prefix_tokens != 1 or model.global_pool != "token":
            raise CollapseError(f"model: merging needs a ViT whose head reads its class token, got {type(model)}")
        for block in model.blocks:
            plain = type(block) is Block and type(block.attn) is Attention
            if not plain or getattr(block.attn, "gate", None) is not None:
                raise CollapseError(f"model: merging knows timm's Block and Attention only, got {type(block)}")
        self.model = model
        self.r = [r] * len(model.blocks) if isinstance(r, int) else list(r)
        if len(self.r) != len(model.blocks) or min(self.r) < 0:
            raise CollapseError(f"r must be {len(model.blocks)} numbers of at least 0, one a block, got {r}")

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> tokens after the last block (B, M, D), and their sizes (B, M, 1); None: nothing merged."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        size = None
        for block, r in zip(model.blocks, self.r, strict=True):
            update, metric = attend(block.attn, block.norm1(x), size)
            x = x + block.ls1(update)
            if r and x.shape[1] > 2:
                size = x.new_ones(*x.shape[:2], 1) if size is None else size
                x, size = merge_tokens(x, size, match_tokens(metric, r))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x, size

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        return self.model.forward_head(self.model.norm(self.tokens(images)[0]))


def schedule_for_macs(count: Callable[[list[int]], float], target: float, depth: int, tokens: int) -> list[int]:
    """The schedule whose cost is nearest to a target, by bisection over the number of merges.

    Schedules are as even as can be: r or r + 1 merges in a block, the larger ones first.

    Args:
        count: Schedule -> multiply-accumulates; falls as merges are added.
        target: Wanted multiply-accumulates.
        depth: Blocks.
        tokens: Tokens before the first block.

    Returns:
        `depth` numbers of merges; the cheapest schedule there is, where the target is below it.
    """

    def schedule(merges: int) -> list[int]:
        return [merges // depth + (i < merges % depth) for i in range(depth)]

    low, high = 0, depth * (tokens // 2)
    while low < high:  # the fewest merges that cost no more than the target
        middle = (low + high) // 2
        if count(schedule(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    candidates = [schedule(low)] + ([schedule(low - 1)] if low else [])
    return min(candidates, key=lambda each: abs(count(each) - target))


def merging_for_macs(model: VisionTransformer, target: float) -> tuple[TokenMerging, float]:
    """The token merging of a model whose cost is nearest to a target, and its multiply-accumulates an image."""
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size(model), device=parameter.device, dtype=parameter.dtype)

    def count(schedule: list[int]) -> int:
        return count_macs(lambda: TokenMerging(model, schedule)(image))

    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    schedule = schedule_for_macs(count, target, len(model.blocks), tokens)
    return TokenMerging(model, schedule).eval(), count(schedule)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(3, H, W) of the images that a model takes."""
    return (3, *model.patch_embed.img_size) if model.patch_embed.img_size else tuple(model.pretrained_cfg["input_size"])
