"""`timm-collapse latents`: the latents of a data set, encoded once, and the scale of one's own VAE.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import add_batches, add_data, add_device, check_numbers, open_device, worker_count

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from ..data.latent_scale import LatentStatistics
    from ..models import PixelCodec, VaeCodec

SUMMARY = "the latents of a data set, to train a generator on"
DESCRIPTION = (
    "Encodes a data set once, for training generators: posterior mean and standard deviation of the latents of each "
    "image and of its mirror image, or pixels as they are. Go on with a killed run by starting it again. With "
    "--measure-scale nothing is written: prints the factor that gives the latents of your own VAE unit variance."
)
EXAMPLE = """timm-collapse latents --dataset imagenet --split train --vae xwen99/mar-vae-kl16 --img-size 256 \\
      --output latents/imagenet

  your own VAE in diffusers' layout, first its scale, then the latents with it:
  timm-collapse latents --dataset photos --vae my-vae --img-size 128 --measure-scale 2000
  timm-collapse latents --dataset photos --vae my-vae --img-size 128 --scale 0.31 --output latents/photos

  offline, in seconds:
  timm-collapse latents --dataset digits --vae pixels --img-size 8 --output latents/digits"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `latents`."""
    add = parser.add_argument
    add_data(parser)
    # fmt: off
    add("--vae", required=True, metavar="NAME",
        help="pixels; a folder or Hub id of a diffusers AutoencoderKL; or a weight file of MAR's KL-16 (.safetensors, "
        ".ckpt, .pth)")
    add("--scale", type=float, help="factor on the VAE's latents (default: the VAE's scaling_factor)")
    add("--img-size", type=int, required=True, metavar="PIXELS",
        help="side of the images: shorter side resized, centre cropped")
    add("--output", metavar="FOLDER", help="where the latents go")
    add("--shard-size", type=int, metavar="N", help="images a file (default: the folder's, 4096 in a new one)")
    add_batches(parser)
    add_device(parser)
    add("--measure-scale", type=int, nargs="?", const=1000, metavar="N",
        help="only measure and print the scale of the VAE's latents, on so many evenly spaced images; 0 for all "
        "(default: 1000)")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Encodes the data set, or measures the scale."""
    from ..data import LatentCache, describe_dataset, open_dataset
    from ..models import load_codec
    from ..order import CollapseError

    check_numbers(args, {"img_size": 1, "shard_size": 1, "batch_size": 1, "workers": 0, "measure_scale": 0})
    if (args.output is None) == (args.measure_scale is None):
        raise CollapseError("--output must name the folder for the latents; only --measure-scale takes none")
    device = open_device(args.device)
    info = open_dataset(args.dataset, args.split, args.part)
    codec = load_codec(args.vae, args.scale).to(device)
    if args.measure_scale is not None:
        _print_scale(measured_scale(args, info.dataset, codec, device), codec)
        return
    source = describe_dataset(args.dataset, args.split, args.part)
    cache = LatentCache.build(
        args.output, info.dataset, codec, args.img_size, source, args.shard_size, args.batch_size, device,
        num_classes=info.num_classes, workers=worker_count(args),
    )  # fmt: skip
    shape = " x ".join(map(str, cache.latent_shape))
    print(f"latents of {len(cache)} images, {shape} each, {cache.num_classes} classes: {args.output}")


def measured_scale(
    args: argparse.Namespace, dataset: Dataset, codec: PixelCodec | VaeCodec, device: torch.device
) -> LatentStatistics:
    """Mean and spread of the latents of evenly spaced images."""
    from torch.utils.data import Subset
    from tqdm.auto import tqdm

    from ..data import ImageLoader
    from ..data.latent_scale import latent_scale
    from ..data.latents import ResizedPixels

    count = min(args.measure_scale or len(dataset), len(dataset))
    even = [number * len(dataset) // count for number in range(count)]
    pixels = Subset(ResizedPixels(dataset, args.img_size), even)
    loader = ImageLoader(pixels, args.batch_size, num_workers=worker_count(args))
    return latent_scale(codec, (pixels.to(device).float() / 255 for pixels, _ in tqdm(loader, desc="scale")))


def _print_scale(found: LatentStatistics, codec: PixelCodec | VaeCodec) -> None:
    print(f"recommended scale   {found.scale:.5g} +- {found.difference:.2g} (two halves of {found.images} images)")
    print(f"scale in use        {codec.scale:.5g}: gives a standard deviation of {found.std * codec.scale:.4g}")
    print(f"unscaled latents    mean {found.mean:.4g}, standard deviation {found.std:.4g}")
    print(f"by channel          {' '.join(f'{std:.3g}' for std in found.channel_std)}")
    print(f"go on with          --scale {found.scale:.5g}")
