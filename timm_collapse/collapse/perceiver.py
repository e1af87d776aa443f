"""Collapsed Perceiver: the linear-time backbone. Its tokens are single pixels, 50,176 at 224 px.

A fixed number of latents reads the tokens by cross-attention, so that the cost is linear in their number, and nothing
but a position tells one token from another: any of them can be dropped.
"""

from __future__ import annotations

from torch import nn

from ..models.transformer import gather_tokens
from .hf import CollapsedHf, Part


class KeepInputs(Part):
    """An input preprocessor that returns the tokens of the kept pixels."""

    def forward(self, *args, **kwargs):
        inputs, sizes, without_positions = super().forward(*args, **kwargs)
        selection = self.carrier.selection
        if selection is not None:
            inputs, without_positions = (gather_tokens(x, selection.kept) for x in (inputs, without_positions))
        return inputs, sizes, without_positions


class CollapsedPerceiver(CollapsedHf):
    """`PerceiverForImageClassificationLearned` and `...Fourier` of transformers; `remainder` must be "none".

    The order is made on a coarser grid and resampled: see `CollapseOrder`, `spread`.
    """

    def _attach(self) -> None:
        self._attach_part(KeepInputs, self._preprocessor())

    num_prefix_tokens = 0

    def why_no_remainder(self) -> str:
        return "a Perceiver joins positions to its tokens, and one that stands for several pixels has none"

    def _preprocessor(self) -> nn.Module:
        return self.perceiver.input_preprocessor

    def _argument(self, name: str, args: tuple, kwargs: dict):
        value = super()._argument(name, args, kwargs)
        if name == "pixel_values" and value is None:
            value = super()._argument("inputs", args, kwargs)
        return value

    @property
    def any_size(self) -> bool:
        """Fourier features are made for the size of the image; learned positions are of one size."""
        return not hasattr(self._preprocessor().position_embeddings, "position_embeddings")

    def _patch_size(self) -> tuple[int, int]:
        return 1, 1
