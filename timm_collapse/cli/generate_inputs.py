"""What `timm-collapse generate` works with, from its arguments: the model, its codec, labels, order and photo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.images import load_photo, photo_tensor
from ..hub.mar_checkpoints import load_mar
from ..hub.weight_files import SUFFIXES
from ..models import MAR, PixelCodec, VaeCodec, load_codec
from ..models.registry import load_model
from ..order import ClassOrderBank, CollapseError, GenerationOrder

FROM_BANK = ("collapse", "collapse_reversed")


class Edit(NamedTuple):
    """A photo to change.

    Attributes:
        photo: (3, H, W) float in [0, 1], at the size of the model.
        regenerate: (L,) bool: the tokens to make anew.
    """

    photo: Tensor
    regenerate: Tensor


def load_generator(name: str) -> MAR:
    """A generator by its registered name, folder, Hub id or checkpoint file, in eval mode.

    Raises:
        CollapseError: Nothing of that name, or no MAR.
    """
    path = Path(name.removeprefix("local-dir:"))
    if path.suffix in SUFFIXES and not path.is_dir():
        try:
            return load_mar(path)
        except CollapseError as error:
            raise CollapseError(f"--model: {str(error).removeprefix('init: ')}") from error
    model = load_model(name, "--model")
    if not isinstance(model, MAR):
        raise CollapseError(f"--model: {name!r} is no generator, but a {type(model).__name__}")
    return model


def matching_codec(mar: MAR, name: str | None) -> PixelCodec | VaeCodec:
    """The codec of a generator's latents, or another one of the same shape.

    Raises:
        CollapseError: Nothing of that name, or one whose latents have another number of channels or another stride.
    """
    codec = mar.codec() if name is None else load_codec(name)
    wanted = (mar.vae_embed_dim, mar.img_size // mar.latent_shape[1])
    if (codec.channels, codec.stride) != wanted:
        raise CollapseError(
            f"--vae: the model's latents have {wanted[0]} channels and a stride of {wanted[1]} pixels, those of "
            f"{name or mar.vae!r} {codec.channels} and {codec.stride}"
        )
    return codec


def parse_labels(texts: list[str] | None, per_label: int, num_classes: int) -> Tensor:
    """(B,) long: each label `per_label` times in a row; zeros for a model without classes.

    Raises:
        CollapseError: Labels that are missing, no class numbers, or for a model without classes.
    """
    if not num_classes:
        if texts:
            raise CollapseError("--labels: the model has no classes; --per-label is the number of images")
        return torch.zeros(per_label, dtype=torch.long)
    allowed = f"class numbers in [0, {num_classes - 1}], or all"
    if not texts:
        raise CollapseError(f"--labels: must be {allowed}, got none")
    if texts == ["all"]:
        return torch.arange(num_classes).repeat_interleave(per_label)
    for text in texts:
        if not text.isascii() or not text.isdecimal() or int(text) >= num_classes:
            raise CollapseError(f"--labels: must be {allowed}, got {text!r}")
    return torch.tensor([int(text) for text in texts]).repeat_interleave(per_label)


def choose_order(args: argparse.Namespace, mar: MAR) -> GenerationOrder | None:
    """The order that the arguments name, or the model's own; None with --draft, which makes one.

    Loads --bank into the model.

    Raises:
        CollapseError: An unknown order, no bank for a collapse order, a bank of other classes, or arguments that would
            be ignored.
    """
    if args.draft:
        for name in ("order", "bank"):
            if getattr(args, name) is not None:
                raise CollapseError(f"--{name} must not be given with --draft, which makes the order")
        return None
    if args.orderer is not None:
        raise CollapseError(f"--orderer is for --draft, got {args.orderer!r} without it")
    if args.bank:
        mar.load_bank(args.bank)
    name = args.order or ("random" if mar.bank is None else "collapse")
    if name in FROM_BANK:
        _check_bank(mar.bank, name, mar)
    elif args.bank:
        raise CollapseError(f"--bank is for --order {' or '.join(FROM_BANK)}, got --order {name}")
    return GenerationOrder(name, mar.grid, mar.bank if name in FROM_BANK else None)


def _check_bank(bank: ClassOrderBank | None, name: str, mar: MAR) -> None:
    if bank is None:
        raise CollapseError(
            f"--order {name} needs an order bank, and the model brings none: make one with `timm-collapse order-bank "
            f"--grid {mar.grid[0]} {mar.grid[1]}` and give it as --bank"
        )
    if bank.num_classes != max(1, mar.num_classes):
        raise CollapseError(f"--bank: must have orders of {max(1, mar.num_classes)} classes as the model, got "
                            f"{bank.num_classes}")  # fmt: skip


def read_edit(args: argparse.Namespace, mar: MAR) -> Edit | None:
    """The photo and what to change in it; None without --image.

    Raises:
        CollapseError: A photo or mask that cannot be read, a mask of another size or without white, a box that is
            empty or reaches out of the photo, or one of the arguments without the other.
    """
    if (args.image is None) != (args.regenerate is None):
        raise CollapseError("--image and --regenerate must be given together, got only "
                            + ("--image" if args.image else "--regenerate"))  # fmt: skip
    if args.image is None:
        return None
    photo, side = load_photo(args.image), mar.img_size
    changed = torch.zeros(side, side, dtype=torch.bool)
    for given in args.regenerate:
        changed |= _mask(given[0], photo.size, side) if len(given) == 1 else _box(given, side)
    rows, columns = mar.grid
    regenerate = changed.view(rows, side // rows, columns, side // columns).any(3).any(1).flatten()
    return Edit(photo_tensor(photo, side), regenerate)


def _mask(path: str, size: tuple[int, int], side: int) -> Tensor:
    """(side, side) bool: where the image of a file is white."""
    mask = load_photo(path)
    if mask.size not in (size, (side, side)):
        raise CollapseError(
            f"--regenerate: a mask must be as large as the photo, {size[0]} x {size[1]} pixels, or as the model's "
            f"images, {side} x {side}, got {mask.width} x {mask.height}"
        )
    changed = photo_tensor(mask, side).mean(0) > 0.5
    if not changed.any():
        raise CollapseError(f"--regenerate: a mask must have white pixels where to regenerate, {path} has none")
    return changed


def _box(texts: list[str], side: int) -> Tensor:
    """(side, side) bool: the inside of TOP LEFT BOTTOM RIGHT."""
    try:
        top, left, bottom, right = map(int, texts)
        inside = 0 <= top < bottom <= side and 0 <= left < right <= side
    except ValueError:
        inside = False
    if not inside:
        raise CollapseError(
            "--regenerate: must be the file of a mask, or TOP LEFT BOTTOM RIGHT with TOP < BOTTOM and LEFT < RIGHT in "
            f"[0, {side}], the photo's pixels as the model sees it, got {' '.join(texts)}"
        )
    changed = torch.zeros(side, side, dtype=torch.bool)
    changed[top:bottom, left:right] = True
    return changed
