"""`timm-collapse generate`: images of a MAR or CMAR, new ones or changed photos.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    DEFAULT_ORDERER,
    ORDERERS,
    add_device,
    add_seed,
    check_numbers,
    check_outputs,
    console,
    load_orderer,
    open_device,
    option,
)

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..models import MAR, CollapseOrder, PixelCodec, VaeCodec
    from ..order import GenerationOrder
    from .generate_inputs import Edit

MAX_STEPS, MAX_DIFFUSION_STEPS = 64, 1000
MAX_SHOWN = 254  # images in the grid; with the photo of an edit twice, as many as a picture takes

SUMMARY = "images of a generator, patch by patch along an order"
DESCRIPTION = (
    "Generates images of classes, or changes a part of a photo, patch by patch along an order. The arguments mean what "
    "those of MAR.generate mean. With --draft a cheap draft is made first, and its collapse order is the order of the "
    "image. The same seed gives the same images, but only at the same batch size and on the same kind of device."
)
EXAMPLE = """timm-collapse generate --model cmar_base --labels 207 360 --per-label 4 --steps 64 \\
      --guidance-scale 3 --order collapse --bank bank.safetensors --precision bf16 --film film.png

  for timm-collapse evaluate-generation, with any MAR checkpoint:
  timm-collapse generate --model mar_base.pth --labels all --per-label 50 --guidance-scale 2.9 --samples samples.npz

  inpainting: the model fills the box between rows 64 and 192, columns 32 and 128 of the photo:
  timm-collapse generate --model mar_base.pth --labels 207 --image photo.jpg --regenerate 64 32 192 128

  offline, in seconds, with a bundled model:
  timm-collapse generate --model cmar_tiny_patch4_32 --labels all --steps 16 --guidance-scale 3"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `generate`."""
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, metavar="NAME",
        help="generator: a registered name with its tag, hf-hub:<id>, a local folder, or a checkpoint file of MAR "
        "(.pth or .safetensors; its EMA weights, if it has them)")
    add("--labels", nargs="+", metavar="CLASS",
        help="class numbers, or all; a model without classes takes none")
    add("--per-label", type=int, default=1, metavar="N", help="images of each label (default: %(default)s)")
    add("--steps", type=int, metavar="T",
        help=f"iterations, at most one a token to generate (default: {MAX_STEPS}, or as many as there are tokens)")
    add("--guidance-scale", type=float, default=1.0, help="1 for no guidance (default: %(default)s)")
    add("--guidance-schedule", choices=("linear", "constant"), default="linear",
        help="linear: from 1 up with the share of generated tokens (default: %(default)s)")
    add("--temperature", type=float, default=1.0,
        help="factor on the noise of the diffusion steps (default: %(default)s)")
    add("--diffusion-steps", type=int, nargs="+", metavar="N",
        help="of the diffusion head; two numbers: annealed from the first to the second along the iterations "
        "(default: the model's)")
    add("--order", metavar="NAME",
        help="which tokens come first: random, raster, centre, halton, bayer, collapse, collapse_reversed or "
        "confidence (default: collapse where the model or --bank has an order bank, else random)")
    add("--bank", metavar="FILE", help="order bank, of timm-collapse order-bank (default: the model's own)")
    add("--draft", type=int, metavar="STEPS",
        help="first generate a draft in so many iterations, without guidance; its order is that of the image")
    add("--orderer", metavar="NAME", help=f"of the draft: {ORDERERS} (default: {DEFAULT_ORDERER})")
    add("--image", metavar="PHOTO",
        help="change this photo, resized and centre-cropped to the model's size; what is kept goes through the VAE")
    add("--regenerate", nargs="+", action="append", metavar="BOX",
        help="part of --image to make anew, may be repeated: TOP LEFT BOTTOM RIGHT in pixels of the cropped photo, or "
        "the file of a mask that is white there; every token that it touches is made anew")
    add("--vae", metavar="NAME",
        help="codec of the latents: pixels, a folder or Hub id of a diffusers AutoencoderKL, or a weight file of MAR's "
        "KL-16 (default: the model's)")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--precision", choices=("no", "bf16", "fp16"), default="no",
        help="bf16 and fp16 run under autocast, the VAE in fp32 (default: %(default)s)")
    add_device(parser)
    add_seed(parser, "all that is drawn")
    add("--output", default="samples.png", metavar="PATH",
        help="grid of the images (the first 254), a row a class, .png, .pdf or .svg (default: %(default)s)")
    add("--film", metavar="PATH", help="also draw how the first images (up to 4) came to be, and in which order")
    add("--samples", metavar="PATH",
        help="also write all images for evaluate-generation: an empty or new folder for <number>_<label>.png, or an "
        ".npz file as ADM's: arr_0 (N, H, W, 3) uint8, labels arr_1")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Generates the images, writes them and says where."""
    import torch
    from tqdm.auto import tqdm

    from ..plots import Film, save
    from .generate_inputs import choose_order, load_generator, matching_codec, parse_labels, read_edit

    _check(args)
    device = open_device(args.device)
    mar = load_generator(args.model).to(device)
    labels = parse_labels(args.labels, args.per_label, mar.num_classes)
    edit = read_edit(args, mar)
    steps = _steps(args, mar.seq_len if edit is None else int(edit.regenerate.sum()))
    order = choose_order(args, mar)
    orderer = load_orderer(args.orderer or DEFAULT_ORDERER, seed=args.seed).to(device) if args.draft else None
    codec = matching_codec(mar, args.vae).to(device)

    generator = torch.Generator(device).manual_seed(args.seed)
    film = Film(mar.grid, steps, None if edit is None else ~edit.regenerate) if args.film else None
    written, shown, start = _Written(args.samples, mar.num_classes), [], time.perf_counter()
    parts = labels.split(args.batch_size)
    with tqdm(total=len(parts) * steps, desc="generating", unit="step") as bar:
        for number, part in enumerate(parts):

            def callback(step: int, latents: Tensor, known: Tensor, first: bool = number == 0) -> None:
                bar.update()
                if film is not None and first:
                    film(step, latents, known)

            batch = part.to(device)
            latents = sample(args, mar, codec, batch, steps, order, orderer, edit, generator, callback)
            pixels = (codec.decode(latents) * 255).round().to(torch.uint8).cpu()
            written.add(pixels, part)
            shown.append(pixels[: max(0, MAX_SHOWN - number * args.batch_size)])
    seconds = time.perf_counter() - start
    written.finish()
    save(_grid(torch.cat(shown), labels, edit, mar), args.output)
    if film is not None:
        save(film.plot(codec), args.film)
    _print(args, len(labels), seconds, steps, "draft" if order is None else order.name)


def sample(
    args: argparse.Namespace,
    mar: MAR,
    codec: PixelCodec | VaeCodec,
    labels: Tensor,
    steps: int,
    order: GenerationOrder | None,
    orderer: CollapseOrder | None,
    edit: Edit | None,
    generator: torch.Generator,
    callback: Callable[[int, Tensor, Tensor], None],
) -> Tensor:
    """Latents of one batch; without an order, along that of a draft."""
    import torch

    from ..models.draft import draft_order

    device, given = labels.device, {}
    if edit is not None:
        latents = codec.moments(edit.photo[None].to(device))[0]
        given = {"latents": latents.expand(len(labels), -1, -1, -1), "regenerate": edit.regenerate.to(device)}
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=args.precision != "no"):
        if order is None:
            order = draft_order(mar, codec, orderer, labels, args.draft, generator=generator, **given)
        return mar.generate(
            labels,
            steps,
            args.guidance_scale,
            args.guidance_schedule,
            args.temperature,
            order,
            generator=generator,
            diffusion_steps=_diffusion_steps(args),
            callback=callback,
            **given,
        )


class _Written:
    """Writes --samples: files of a folder as they come, or an .npz file at the end."""

    def __init__(self, path: str | None, num_classes: int):
        self.npz = path if path and Path(path).suffix == ".npz" else None
        self.folder = Path(path) if path and not self.npz else None
        self.num_classes, self.count, self.pixels, self.labels = num_classes, 0, [], []
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, pixels: Tensor, labels: Tensor) -> None:
        """(B, 3, H, W) uint8 and (B,) long."""
        from PIL import Image

        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        if self.folder:
            for array, label in zip(arrays, labels.tolist()):
                name = f"{self.count:06d}_{label}.png" if self.num_classes else f"{self.count:06d}.png"
                Image.fromarray(array).save(self.folder / name)
                self.count += 1
        if self.npz:
            self.pixels.append(arrays)
            self.labels.append(labels.numpy())

    def finish(self) -> None:
        """Writes the .npz file; that of a model without classes has no labels."""
        import numpy as np

        if self.npz:
            labels = {"arr_1": np.concatenate(self.labels)} if self.num_classes else {}
            np.savez(self.npz, arr_0=np.concatenate(self.pixels), **labels)


def _grid(pixels: Tensor, labels: Tensor, edit: Edit | None, mar: MAR) -> Figure:
    """The picture of the first images; for an edit below the photo, and the photo without what is made anew."""
    import torch

    from ..plots import plot_samples
    from ..plots.style import blanked

    images, names = pixels.float() / 255, None
    if mar.num_classes:
        names = [f"class {label}" for label in labels[: len(images)].tolist()]
    if edit is not None:
        hidden = torch.from_numpy(blanked(edit.photo.permute(1, 2, 0).numpy(), ~edit.regenerate, mar.grid))
        images = torch.cat([edit.photo[None], hidden.permute(2, 0, 1)[None].float(), images])
        names = ["photo", "photo", *(names or ["new"] * len(pixels))]
    return plot_samples(images, names)


def _steps(args: argparse.Namespace, tokens: int) -> int:
    """The iterations, for so many tokens to generate."""
    from ..order import CollapseError

    steps = min(MAX_STEPS, tokens) if args.steps is None else args.steps
    for name, value in (("steps", steps), ("draft", args.draft)):
        if value is not None and not 1 <= value <= tokens:
            raise CollapseError(f"--{name}: must be in [1, {tokens}], as there are {tokens} tokens to generate, "
                                f"got {value}")  # fmt: skip
    return steps


def _diffusion_steps(args: argparse.Namespace) -> int | tuple[int, int] | None:
    steps = args.diffusion_steps
    return steps and (steps[0] if len(steps) == 1 else tuple(steps))


def _check(args: argparse.Namespace) -> None:
    """What would otherwise fail only after a model is loaded or images are generated, or be ignored."""
    from ..order import CollapseError

    check_numbers(args, {"per_label": 1, "batch_size": 1, "guidance_scale": 0, "temperature": 0})
    numbers = args.diffusion_steps or [1]
    if len(numbers) > 2 or not all(1 <= number <= MAX_DIFFUSION_STEPS for number in numbers):
        raise CollapseError(f"--diffusion-steps must be one or two numbers in [1, {MAX_DIFFUSION_STEPS}], got "
                            f"{' '.join(map(str, numbers))}")  # fmt: skip
    check_outputs(args, pictures=("output", "film"))
    if args.samples and Path(args.samples).suffix == ".npz":
        check_outputs(args, "samples", pictures=())
    elif args.samples:
        _check_folder(args)


def _check_folder(args: argparse.Namespace) -> None:
    """A folder of samples holds nothing else: evaluate-generation measures all images in it."""
    from ..order import CollapseError

    folder = Path(args.samples)
    if folder.exists() and not folder.is_dir():
        raise CollapseError(f"--samples must be a folder or a file that ends in .npz, got the file {args.samples!r}")
    if folder.is_dir() and any(folder.iterdir()):
        raise CollapseError(f"--samples: the folder {args.samples!r} is not empty, and evaluate-generation would "
                            "measure what is in it, too; empty it, or name another folder")  # fmt: skip
    for name in ("output", "film"):
        path = getattr(args, name)
        if path and Path(path).resolve().is_relative_to(folder.resolve()):
            raise CollapseError(f"{option(name)} must not be in the folder of --samples, got {path!r}: "
                                "evaluate-generation would measure it, too")  # fmt: skip


def _print(args: argparse.Namespace, count: int, seconds: float, steps: int, order: str) -> None:
    from rich.markup import escape

    outputs = (("grid", args.output), ("film", args.film), ("samples", args.samples))
    places = "; ".join(f"{name}: {escape(path)}" for name, path in outputs if path)
    speed = f"{seconds:.1f} s, {count / seconds:.3g} images/s"
    console(args).print(f"{count} images, {steps} steps, order {order}, {speed}; {places}", soft_wrap=True)
