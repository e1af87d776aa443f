"""Collapsed Hugging Face vision models: ViT, DINOv2, DINOv3, SigLIP and CLIP of `transformers`.

The model that is collapsed selects the patches and takes `order`; its embeddings, wherever they lie inside, drop the
tokens of the others after the position embedding. `transformers` is never imported here: a model brings its classes.
"""

from __future__ import annotations

import inspect
import warnings

from torch import Tensor, nn

from ..order import CollapseError, Order
from ..order.errors import describe
from .base import Collapsed, check_area_bias
from .classes import Remade, become, collapsed_class, on_hand, set_forward, take_name
from .selection import embed_kept, image_size, spread_kept

TRUNKS = ("vit", "dinov2", "dinov2_with_registers", "vision_model", "perceiver")
"""Attributes under which a model with a head holds the model that embeds the patches."""

MASKED_KERNELS = ("sdpa", "eager")
"""Implementations of attention that take what is added to the logits."""


class Part(Remade):
    """Mixin of the modules inside of a collapsed model that see its selection; made by `CollapsedHf._attach_part`."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if len(cls.__bases__) == 2:
            take_name(cls)


class KeepTokens(Part):
    """Embeddings that return the tokens of the kept patches, then the remainder's."""

    def forward(self, *args, **kwargs) -> Tensor:
        tokens, selection = super().forward(*args, **kwargs), self.carrier.selection
        return tokens if selection is None else selection.apply(tokens, self.num_prefix_tokens)


class KeepRotary(Part):
    """A rotary table, (N, d), with the rows of each image's tokens, (B, 1, k + r, d)."""

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        (cos, sin), selection = super().forward(*args, **kwargs), self.carrier.selection
        if selection is None:
            return cos, sin
        places = selection.positions()
        return cos[places].unsqueeze(1), sin[places].unsqueeze(1)


class SparseConv(Part):
    """A patch embedding that computes only the kept patches and leaves zeros in the places of the others."""

    def forward(self, x: Tensor) -> Tensor:
        selection = self.carrier.selection
        if selection is None:
            return super().forward(x)
        return spread_kept(embed_kept(self, x, selection), selection).mT.unflatten(2, selection.grid)


class BiasedLayer(Part):
    """A layer of the encoder that gets the area bias as its attention mask.

    In `__call__`, so that it is an argument of what gradient checkpointing runs again.
    """

    def __call__(self, *args, **kwargs):
        bias = getattr(self.carrier.selection, "key_bias", None)
        if bias is None:
            return super().__call__(*args, **kwargs)
        return super().__call__(*args[:1], **{**kwargs, "attention_mask": bias})  # all others were refused


class BiasedPool(Part):
    """SigLIP's pooling by attention, with the area bias."""

    def forward(self, *args, **kwargs):
        bias = getattr(self.carrier.selection, "key_bias", None)
        if bias is None:
            return super().forward(*args, **kwargs)
        queries = args[0] if args else kwargs["query"]
        mask = bias.expand(queries.shape[0], self.num_heads, queries.shape[1], -1).flatten(0, 1)
        return super().forward(*args, **{**kwargs, "attn_mask": mask})


class CollapsedHf(Collapsed):
    """ViT, SigLIP and CLIP: absolute positions of one image size, other sizes with `interpolate_pos_encoding=True`.

    Outputs are the plain model's with fewer tokens: `last_hidden_state`, `hidden_states` and `attentions` are of the
    leading tokens, the kept patches in the order of their positions, and the remainder's tokens. Heads that average
    the patches average those, whatever their areas. Parts of the model that are called on their own see all patches.
    """

    any_size = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if len(cls.__bases__) == 2:
            take_name(cls)
            set_forward(cls, CollapsedHf.forward)

    def _attach(self) -> None:
        embeddings, conv = self._embeddings(), self._conv()
        embeddings.num_prefix_tokens = self._num_class_tokens()
        if getattr(embeddings, "register_tokens", None) is not None:
            embeddings.num_prefix_tokens += embeddings.register_tokens.shape[1]
        self._attach_part(KeepTokens, embeddings)
        if isinstance(conv, Part) or type(conv) is nn.Conv2d:
            self._attach_part(SparseConv, conv)
        for layer in encoder_layers(self):
            self._attach_part(BiasedLayer, layer)
        if (pool := getattr(getattr(trunk(self), "head", None), "attention", None)) is not None:
            self._attach_part(BiasedPool, pool)

    @classmethod
    def why_no_area_bias(cls, model: nn.Module) -> str:
        if why := super().why_no_area_bias(model) or why_no_bias_in_kernel(model):
            return why
        layers = encoder_layers(model)
        known = layers and all("attention_mask" in inspect.signature(layer.forward).parameters for layer in layers)
        return "" if known else "this version of transformers gives its layers no attention mask"

    @classmethod
    def why_no_size_embed(cls, model: nn.Module) -> str:
        return "save_pretrained writes the plain model, without it"

    @property
    def num_prefix_tokens(self) -> int:
        return self._embeddings().num_prefix_tokens

    def _attach_part(self, part: type[Part], module: nn.Module) -> None:
        module.carrier = self.carrier
        if not isinstance(module, part):
            become(module, collapsed_class(part, type(module)))

    def _embeddings(self) -> nn.Module:
        return trunk(self).embeddings

    def _conv(self) -> nn.Conv2d:
        return next(module for module in self._embeddings().modules() if isinstance(module, nn.Conv2d))

    def _num_class_tokens(self) -> int:
        embeddings = self._embeddings()
        return int(hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding"))

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise CollapseError(f"pixel_values must be a tensor of shape (B, C, H, W), got {describe(images)}")
        size, patch = image_size(images), self._patch_size()
        grid = size[0] // patch[0], size[1] // patch[1]  # what is over at the right and at the bottom is not seen
        if min(grid) < 1:
            raise CollapseError(f"pixel_values must have at least one patch of {patch} pixels, got {size}")
        return grid

    def _own_size(self) -> tuple[int, int]:
        """Height and width of the images that the model's positions are made for."""
        own = trunk(self).config.image_size
        return (own, own) if isinstance(own, int) else tuple(own)

    def _refuse_size(self, images: Tensor, interpolate: bool) -> None:
        own, size = self._own_size(), image_size(images)
        if not self.any_size and not interpolate and size != own:
            raise CollapseError(
                f"pixel_values must be {own} pixels, the model's image_size, got {size}; "
                "interpolate_pos_encoding=True lifts it"
            )

    def _patch_size(self) -> tuple[int, int]:
        return tuple(self._conv().stride)

    def _embed_patches(self, images: Tensor) -> Tensor:
        conv = self._conv()
        return self.carrier.run(None, conv, images.to(conv.weight.dtype)).flatten(2).mT

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor | None:
        embedding = getattr(self._embeddings(), "position_embedding", self._embeddings())
        return on_hand(embedding, lambda: self._positions_on_hand(grid))

    def _positions_on_hand(self, grid: tuple[int, int]) -> Tensor:
        embeddings, (p, q), classes = self._embeddings(), self._patch_size(), self._num_class_tokens()
        positions = getattr(embeddings, "position_embeddings", None)
        if positions is None:
            positions = embeddings.position_embedding.weight.unsqueeze(0)
        if grid != tuple(side // patch for side, patch in zip(self._own_size(), (p, q))):
            # the method looks only at the shape of the tokens
            tokens = positions.new_empty(1, grid[0] * grid[1] + classes, positions.shape[-1])
            positions = embeddings.interpolate_pos_encoding(tokens, grid[0] * p, grid[1] * q)
        return positions[:, classes:]

    def save_pretrained(self, *args, **kwargs) -> None:
        """As the plain model's, and of the plain model: its files know of no orderer."""
        warnings.warn(
            "save_pretrained writes the plain model; after from_pretrained, collapse it again: "
            f"collapse(model, orderer, keep={self.keep})",
            stacklevel=2,
        )
        return super().save_pretrained(*args, **kwargs)

    def _argument(self, name: str, args: tuple, kwargs: dict):
        place = self.argument_names.index(name) if name in self.argument_names else len(args)
        return args[place] if place < len(args) else kwargs.get(name)

    def forward(self, *args, order: Order | None = None, **kwargs):
        """As the plain model's; `order` takes the place of the orderer's.

        Raises:
            CollapseError: An order of another batch or grid, or, while patches are dropped, images of another size,
                `bool_masked_pos` or `attention_mask`.
        """
        images = self._argument("pixel_values", args, kwargs)
        selection = self.select(images, order)
        if selection is not None:
            self._refuse_size(images, bool(self._argument("interpolate_pos_encoding", args, kwargs)))
            for name in ("bool_masked_pos", "attention_mask"):
                value = self._argument(name, args, kwargs)
                if value is not None:
                    raise CollapseError(
                        f"{name} must be None while patches are dropped (keep={self.keep}): it is laid out for all "
                        f"patches, got {describe(value)}"
                    )
            if selection.key_bias is not None:
                check_area_bias(self.area_bias, why_no_bias_in_kernel(self))  # it may be another since
        return self.carrier.run(selection, super().forward, *args, **kwargs)


class CollapsedDinov2(CollapsedHf):
    """DINOv2, with or without registers: positions are always interpolated."""

    any_size = True


class CollapsedDinov3(CollapsedDinov2):
    """DINOv3: rotary positions only."""

    def _attach(self) -> None:
        super()._attach()
        self._attach_part(KeepRotary, trunk(self).rope_embeddings)

    def _patch_positions(self, grid: tuple[int, int]) -> None:
        return None


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of a supported model."""
    return [module for module in trunk(model).modules() if type(module).__name__.endswith("Layer")]


def why_no_bias_in_kernel(model: nn.Module) -> str:
    """Why a model's implementation of attention takes nothing that is added to its logits; empty where it does."""
    kernel = model.config._attn_implementation
    known = kernel in MASKED_KERNELS
    return "" if known else f"its attn_implementation is {kernel}, not {' or '.join(MASKED_KERNELS)}"


def trunk(model: nn.Module) -> nn.Module:
    """The module inside of a supported model that holds `embeddings`."""
    while not hasattr(model, "embeddings"):
        model = next(getattr(model, name) for name in TRUNKS if hasattr(model, name))
    return model
