"""The text of a vision-language model without the image tokens that are dropped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..order import CollapseError, Order

AS_LONG_AS_TEXT = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}
"""Inputs (B, L) from which dropped tokens are taken, and what padding they get."""


class Kept(NamedTuple):
    """Which cells of each image of a batch are seen, images in the order of their placeholders."""

    cells: list[Tensor]
    """One (k,) long each, ascending."""
    counts: list[int]
    """Cells that each image has."""
    order: Order | None
    """Of all images, where they have one grid."""
    leading: int = 0
    """Placeholders of each image ahead of its cells, which always stay: of a class token."""

    def mask(self) -> Tensor:
        """(sum of counts and leading,) bool: which placeholders stay, one image after the other."""
        masks = [torch.zeros(n, dtype=torch.bool, device=k.device).scatter(0, k, True) for k, n in zip(*self[:2])]
        return torch.cat([pad(mask, (self.leading, 0), value=True) for mask in masks])


class Shortened(NamedTuple):
    """A text without the placeholders of dropped cells."""

    inputs: dict[str, Any]
    index: Tensor
    """(B, L') long: the place in the whole text of each token."""
    real: Tensor
    """(B, L') bool: False for padding on the left, where texts of a batch lose different numbers of tokens."""
    length: int
    """L, of the whole text."""

    def spread(self, logits: Tensor) -> Tensor:
        """(B, L', V) -> (B, L, V), 0 at dropped tokens."""
        whole = logits.new_zeros(logits.shape[0], self.length, logits.shape[-1])
        return whole.scatter(1, self.index.unsqueeze(-1).expand_as(logits), logits * self.real.unsqueeze(-1))


class Gap(NamedTuple):
    """What a cache remembers of the text that it was filled with."""

    length: int
    """Of the whole text."""
    held: int
    """Tokens in the cache."""
    real: Tensor
    """(B, held) bool."""
    following: Tensor
    """Position of the token that follows, (B,) or (axes, B)."""


def next_positions(short: Shortened) -> Tensor:
    positions = short.inputs["position_ids"]
    highest = positions.masked_fill(~short.real, 0).amax(-1)
    return (highest.amax(0, keepdim=True).expand_as(highest) if highest.ndim == 2 else highest) + 1


def go_on(inputs: dict[str, Any], gap: Gap) -> dict[str, Any]:
    """Inputs that go on with a cache: mask and positions of the whole text become those of the tokens in the cache."""
    inputs, cache = dict(inputs), cache_of(inputs)
    text, seen = text_of(inputs), cache.get_seq_length()
    later = torch.ones(text.shape[0], seen - gap.held + text.shape[1], dtype=torch.long, device=text.device)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] == gap.length + later.shape[1]:
        later = mask[:, gap.length :]
    if mask is None or mask.shape[1] != gap.held + later.shape[1]:
        inputs["attention_mask"] = torch.cat([gap.real.to(later), later], 1)
    if inputs.get("position_ids") is None:
        steps = torch.arange(text.shape[1], device=text.device) + (seen - gap.held)
        inputs["position_ids"] = gap.following.unsqueeze(-1) + steps
    return inputs


def text_of(inputs: dict[str, Any]) -> Tensor:
    """input_ids (B, L), or inputs_embeds (B, L, D)."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name]
    raise CollapseError("input_ids or inputs_embeds must be given, got neither")


def cache_of(inputs: dict[str, Any]):
    cache = inputs.get("cache")
    return inputs.get("past_key_values") if cache is None else cache
