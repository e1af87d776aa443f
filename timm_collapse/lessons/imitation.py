"""What a ranker learns from another one: all errors that it expects, at the visible sets where it will be asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from ..models.ranker import Ranker
from ..models.tokenizer import patchify, resize_images
from ..models.transformer import border_distances
from ..order import CollapseError, single_errors


class Imitation:
    """The errors that a trained ranker expects, before and after every single patch.

    No reconstructor is run and no error is noisy, so that a small ranker learns in a fraction of the time. The visible
    sets are of the sizes at which the learner's phases start, a quarter more or less.

    Args:
        teacher: A ranker with the learner's grid; frozen here.
    """

    def __init__(self, teacher: Ranker):
        self.teacher = teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, random, learner: Ranker, own: bool) -> tuple[Tensor, None, Tensor]:
        """Sets and errors for one batch.

        Args:
            images: (B, C, H, W), normalised.
            random: Source of `rand(batch, *shape)` (a `Run`).
            learner: What learns.
            own: The visible set is its own choice instead of a random one.

        Returns:
            visible (B, N), None, and errors (B, 1 + N, N), for `Ranker.forward`.
        """
        b, n = images.shape[0], learner.num_patches
        starts = torch.tensor(learner.starts(), device=images.device)
        starts = starts[(random.rand(b) * len(starts)).long()] * (0.75 + 0.5 * random.rand(b))
        scores = learner.rank(images, upto=max(1, int(starts.max()))) if own else random.rand(b, n)
        visible = scores.argsort(1, descending=True).argsort(1) < starts.round().unsqueeze(1)
        return visible, None, single_errors(*self.teacher.factors(self.teacher.static(images), visible))


@torch.no_grad()
def inherit(learner: Ranker, teacher: Ranker, images: Tensor) -> None:
    """Start a ranker whose tokens are cells of patches from one whose tokens are patches.

    The learner begins as the teacher on an image so much smaller that a cell is one of its patches: the cell's pixels
    are averaged, all its patches get the same loadings, and the attention biases are the mean that the rotary
    positions add to the logits. Of a deeper teacher, the last block is the learner's last one.

    Args:
        learner: With cells; changed.
        teacher: With one token a patch, the learner's width, and at least its depth and rank.
        images: (B, C, H, W), normalised: a few, for the means.

    Raises:
        CollapseError: The learner cannot start from this teacher.
    """
    shapes = [(m.cell, m.embed.out_features, len(m.trunk.blocks), m.num_factors) for m in (learner, teacher)]
    (cell, dim, depth, rank), (one, width, deepest, largest) = shapes
    side, scale = learner.grid[0] // cell, cell * learner.patch_size // teacher.patch_size
    if cell == 1 or one != 1 or dim != width or depth > deepest or rank > largest or scale < 1:
        raise CollapseError(
            f"teacher: a ranker of (cell, dim, depth, rank) {shapes[0]} cannot start from one of {shapes[1]}"
        )
    x = patchify(resize_images(images, (side * teacher.patch_size,) * 2), teacher.patch_size)
    grid = (side, side)
    where = teacher.border(border_distances(grid, images.device))
    weight = teacher.embed.weight.unflatten(1, (3, teacher.patch_size, teacher.patch_size)) / scale**2
    learner.embed.weight.copy_(weight.repeat_interleave(scale, 2).repeat_interleave(scale, 3).flatten(1))
    learner.embed.bias.copy_(teacher.embed.bias)
    learner.positions.copy_(where)
    learner.visible_token.copy_(teacher.visible_token / cell**2)
    x, rope = teacher.embed(x) + where, teacher.trunk.positions(grid)
    blocks = [*range(depth - 1), deepest - 1]
    for i, source in enumerate(teacher.trunk.blocks[j] for j in blocks):
        block, attention = learner.trunk.blocks[i], source.attn
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        qkv = F.linear(source.norm1(x), attention.qkv.weight, bias)
        q, k, _ = qkv.unflatten(-1, (3, dim // 32, 32)).permute(2, 0, 3, 1, 4)
        turned = [apply_rot_embed_cat(each, rope) for each in (q, k)]
        learner.trunk.biases[i].copy_((turned[0] @ turned[1].mT - q @ k.mT).mean(0) * 32**-0.5)
        for name in ("norm1", "norm2", "mlp"):
            getattr(block, name).load_state_dict(getattr(source, name).state_dict())
        block.attn.proj.load_state_dict(attention.proj.state_dict())
        block.attn.qkv.weight.copy_(attention.qkv.weight)
        block.attn.qkv.bias.copy_(bias)
        x = source(x, rope=rope)
    learner.trunk.norm.load_state_dict(teacher.trunk.norm.state_dict())
    loadings = teacher.loadings(teacher.trunk.norm(x)).flatten(0, 1)
    main = torch.linalg.eigh(loadings.T @ loadings).eigenvectors[:, -rank:].T  # all, turned, where the ranks are equal
    for part in ("weight", "bias"):
        rows = main @ getattr(teacher.loadings, part), getattr(teacher.log_noise, part)
        head = getattr(learner.head, part)
        head.copy_(torch.cat(rows).repeat(cell**2, *[1] * (head.ndim - 1)))
