"""Collapsed vision-language models of `transformers`: dropped patches reach neither the tower nor the language model.

A processor writes one placeholder token for every cell of an image (a patch, or the patches that the model merges into
one token). The collapsed model orders the cells, lets the tower see the first ones only, and takes the placeholders of
the others out of all that is as long as the text. Stock processors, prompts and `generate` stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.normalisation import Normalisation
from ..models.orderer import CollapseOrder
from ..order import CollapseError, Order, patch_weights, resolve_keep
from ..order.errors import describe
from .classes import set_forward, take_name
from .holder import HoldsOrderer
from .vlm_parts import refuse_other_images
from .vlm_text import AS_LONG_AS_TEXT, Gap, Kept, Shortened, cache_of, go_on, next_positions, text_of


class CollapsedVlm(HoldsOrderer):
    """Mixin of a collapsed vision-language model; subclasses know how a family's tower meets the language model.

    `logits` have the length of the stock model's, 0 at dropped tokens; hidden states and attentions are of the tokens
    that are left. A cache holds only these: go on with it as with the stock model's.

    Attributes:
        orderer: `CollapseOrder` of the cells, see `HoldsOrderer`.
        keep: Token budget of each image, a ratio in (0, 1] of its cells or a count; may be changed at any time. 1 is
            the stock model, bit for bit.
        positions: "keep": every token keeps the position that it has in the whole prompt, gaps and all, as if dropped
            tokens were masked; "close": the tokens behind close up (one-dimensional positions only).
    """

    image_inputs: tuple[str, ...] = ("pixel_values",)
    """Arguments that the tower takes, and the language model does not."""
    closes_up = True
    """Whether positions can close up."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if len(cls.__bases__) == 2:  # the collapsed class of one stock class
            take_name(cls)
            set_forward(cls, CollapsedVlm.collapsed_forward)

    # -- set-up ------------------------------------------------------------------------------------------------------

    def set_up(self, orderer: CollapseOrder, keep: float | int, positions: str, normalisation: Normalisation) -> None:
        """Take what `collapse` has checked."""
        self.hold(orderer)
        self.normalisation, self.positions = normalisation, positions
        self.keep = keep

    def tower(self) -> nn.Module | None:
        """The tower, where it drops patches by itself once it is collapsed."""
        return None

    # -- what a family says ------------------------------------------------------------------------------------------

    def _images(self, inputs: dict[str, Any]) -> list[tuple[list[int], Tensor, tuple[int, int]]]:
        """Images of one size, (n, 3, H, W), with their numbers in the order of placeholders, and their cell grid."""
        raise NotImplementedError

    def _encode(self, inputs: dict[str, Any], kept: Kept):
        """The output of `get_image_features` for the kept cells."""
        raise NotImplementedError

    def _leading(self, inputs: dict[str, Any]) -> int:
        """Placeholders of each image ahead of those of its cells."""
        return 0

    def _positions_of(self, inputs: dict[str, Any], generating: bool) -> Tensor | None:
        """Positions of the whole text, (B, L) or (axes, B, L), as the stock model has them."""
        if generating:
            return self._prepare_position_ids_for_generation(text_of(inputs), dict(inputs))
        text = text_of(inputs)
        return torch.arange(text.shape[1], device=text.device).expand(text.shape[0], -1)

    # -- dropping ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute_order(self, inputs: dict[str, Any], weights: Sequence[Tensor] | Tensor | None = None) -> list[Order]:
        """The orders of the images, in the order of their placeholders, each on its cell grid.

        Args:
            inputs: What the stock model's forward takes, `pixel_values` among it.
            weights: By how much the uncertainty of each cell counts, such as its relevance to the question; for each
                image (N,) of its cells, or a map (H, W) of any resolution, see `CollapseOrder`.

        Raises:
            CollapseError: Images that are not the model's, or wrong weights.
        """
        groups = self._images(inputs)
        orders: list[Order] = [None] * sum(len(numbers) for numbers, _, _ in groups)
        if weights is not None and len(weights) != len(orders):
            raise CollapseError(f"weights must be of the {len(orders)} images of the batch, got {len(weights)}")
        for numbers, images, grid in groups:
            given = None
            if weights is not None:
                maps = (weights[i].unsqueeze(0) if isinstance(weights[i], Tensor) else weights[i] for i in numbers)
                given = torch.cat([patch_weights(one, 1, grid) for one in maps])
            found = self._order(images, grid, weights=given)
            for i in range(len(numbers)):
                orders[numbers[i]] = found[i]
        return orders

    def _order(self, images: Tensor, grid: tuple[int, int], **how) -> Order:
        images = self.normalisation.to(Normalisation.of(self.orderer), images.float())
        return self.orderer_on(images.device)(images, grid=grid, **how)

    @torch.no_grad()
    def compute_kept(self, inputs: dict[str, Any], order: Order | list[Order] | None = None) -> Kept:
        """The cells of each image that are seen.

        Args:
            inputs: What the stock model's forward takes, `pixel_values` among it.
            order: Of the images in the order of their placeholders, on their cell grids: one `Order`, or where grids
                differ a list of one each; None computes it.

        Raises:
            CollapseError: Orders of another number of images or of another grid, a count beyond the cells.
        """
        groups = self._images(inputs)
        total = sum(len(numbers) for numbers, _, _ in groups)
        if isinstance(order, Order):
            order = [order[i : i + 1] for i in range(len(order))]
        if order is not None and len(order) != total:
            raise CollapseError(f"order must be of the {total} images of the batch, got one of {len(order)} images")
        cells: list[Tensor] = [None] * total
        counts, orders = [0] * total, []
        for numbers, images, grid in groups:
            n = grid[0] * grid[1]
            budget = resolve_keep(self.keep, n)
            if order is None:
                of_group = self._order(images, grid, upto=budget, check=False)  # no value is read back from a GPU
            else:
                given = [order[i] for i in numbers]
                for one in given:
                    if one.grid != grid:
                        raise CollapseError(
                            f"order must be on the cell grid {grid} of the image, got one on {one.grid}; "
                            "see Order.resample"
                        )
                of_group = Order(torch.cat([one.scores for one in given]).to(images.device), grid)
            orders.append(of_group)
            for i, kept in zip(numbers, of_group.keep(budget)):
                cells[i], counts[i] = kept, n
        return Kept(cells, counts, orders[0] if len(orders) == 1 else None, self._leading(inputs))

    def _shorten(self, inputs: dict[str, Any], order, generating: bool) -> Shortened | None:
        """The inputs without what is dropped; None where nothing is."""
        if inputs.get("pixel_values") is None or (self.keep == 1.0 and order is None):
            return None
        text = text_of(inputs)
        if inputs.get("pixel_values_videos") is not None:
            raise CollapseError(
                "pixel_values_videos must be None while image tokens are dropped: videos are not ordered"
            )
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != text.shape[1]):
            raise CollapseError(f"attention_mask must be of shape {tuple(text.shape[:2])}, got {describe(mask)}")
        if (cache := cache_of(inputs)) is not None and cache.get_seq_length() > 0:
            raise CollapseError(
                "cache must be empty where images come in while image tokens are dropped, got one of "
                f"{cache.get_seq_length()} tokens: encode the whole conversation anew, or set keep to 1"
            )
        kept = self.compute_kept(inputs, order)
        stays = self._stays(inputs, kept)
        index = stays.long().argsort(dim=1, stable=True)[:, -int(stays.sum(1).max()) :]
        real = stays.gather(1, index)
        short = {name: value for name, value in inputs.items() if name not in self.image_inputs}
        whole = inputs.get("position_ids")
        if whole is None and self.positions == "keep":
            whole = self._positions_of(inputs, generating)
        if mask is None:
            short["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        for name, padding in AS_LONG_AS_TEXT.items():
            if short.get(name) is not None:
                short[name] = short[name].gather(1, index).masked_fill(~real, padding)
        if short.get("inputs_embeds") is not None:
            embeds = short["inputs_embeds"]
            short["inputs_embeds"] = embeds.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        if whole is not None:
            short["position_ids"] = whole.gather(-1, index.expand(*whole.shape[:-1], -1))
        elif not generating:  # where texts are padded on the left, the stock rule of a forward pass would count it
            short["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
        short["mm_encoder_outputs"] = {"image": self._encode(inputs, kept)}
        return Shortened(short, index, real, text.shape[1])

    def _stays(self, inputs: dict[str, Any], kept: Kept) -> Tensor:
        """(B, L) bool: False at the placeholders of dropped cells."""
        ids, token = inputs.get("input_ids"), self.config.image_token_id
        if ids is not None:
            placeholders = ids == token
        else:
            like = torch.tensor(token, device=inputs["inputs_embeds"].device)
            placeholders = (inputs["inputs_embeds"] == self.get_input_embeddings()(like)).all(-1)
        refuse_other_images(placeholders, [count + kept.leading for count in kept.counts], token)
        stays = ~placeholders
        stays[placeholders] = kept.mask().to(stays.device)
        return stays

    # -- forward and generate ----------------------------------------------------------------------------------------

    def collapsed_forward(self, *args, order: Order | list[Order] | None = None, **kwargs):
        """As the stock model's; `order` takes the place of the orderer's.

        Raises:
            CollapseError: Inputs whose image tokens do not match the images, an order of other images, videos, a mask
                that is not (B, L), or `logits_to_keep` that names single tokens.
        """
        inputs = {**dict(zip(self.argument_names, args)), **kwargs}
        short = self._shorten(inputs, order, generating=False)
        if short is None:
            return super().forward(**self._going_on(inputs))
        logits_to_keep = inputs.get("logits_to_keep", 0)
        if isinstance(logits_to_keep, Tensor):
            raise CollapseError("logits_to_keep must be an int while image tokens are dropped, got a tensor")
        as_tuple = short.inputs.pop("return_dict", None) is False
        out = super().forward(**short.inputs, return_dict=True)
        if not logits_to_keep:
            out.logits = short.spread(out.logits)
        if (cache := getattr(out, "cache", None)) is not None:
            last = next_positions(short)
            cache.shortened = Gap(short.length, short.index.shape[1], short.real, last)
        return out.to_tuple() if as_tuple else out

    def _going_on(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs from which nothing is dropped, perhaps because it is already."""
        mask, cache = inputs.get("attention_mask"), cache_of(inputs)
        if (gap := getattr(cache, "shortened", None)) is not None and (mask is None or mask.ndim == 2):
            return go_on(inputs, gap)
        if mask is None and cache is None and self.keep != 1.0 and inputs.get("position_ids") is not None:
            # without a mask the stock model would take gaps between positions for the ends of packed texts
            text = text_of(inputs)
            return {**inputs, "attention_mask": torch.ones(text.shape[:2], dtype=torch.long, device=text.device)}
        return inputs

    def generate(self, inputs: Tensor | None = None, *args, order: Order | list[Order] | None = None, **kwargs):
        """As the stock model's; sequences begin with the whole prompt. `order` takes the place of the orderer's."""
        if inputs is not None:
            kwargs["input_ids"] = inputs
        config = (args[0] if args else kwargs.get("generation_config")) or self.generation_config
        if kwargs.get("pixel_values") is None:
            return super().generate(*args, **kwargs)
        with torch.no_grad():
            short = self._shorten(kwargs, order, generating=True)
        if short is None:
            return super().generate(*args, **kwargs)
        lost = short.length - short.index.shape[1]
        for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            given = kwargs.get(whole) or getattr(config, whole, None)
            if given and not kwargs.get(new) and not getattr(config, new, None):
                short.inputs[whole] = max(1, given - lost)  # it counts the prompt
        result = super().generate(*args, **short.inputs)
        prompt = kwargs.get("input_ids")
        sequences = result if isinstance(result, Tensor) else result.sequences
        if prompt is not None:
            prompt = prompt.repeat_interleave(len(sequences) // len(prompt), 0)
            sequences = torch.cat([prompt, sequences[:, short.index.shape[1] :]], 1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result
