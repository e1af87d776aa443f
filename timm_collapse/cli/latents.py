"""`timm-collapse latents`: the latents of a data set, encoded once, and the scale of one's own VAE.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.latent_scale import LatentStatistics
    from ..models import PixelCodec, VaeCodec

DESCRIPTION = (
    "Encodes a data set once, for training generators: posterior mean and standard deviation of the latents of each "
    "image and of its mirror image, or pixels as they are. Go on with a killed run by starting it again. With "
    "--measure-scale nothing is written: prints the factor that gives the latents of your own VAE unit variance."
)
EXAMPLE = """timm-collapse latents --dataset imagenet --split train --vae xwen99/mar-vae-kl16 --img-size 256 \\
      --out latents/imagenet

  your own VAE in diffusers' layout, first its scale, then the latents with it:
  timm-collapse latents --dataset photos --vae my-vae --img-size 128 --measure-scale --images 2000
  timm-collapse latents --dataset photos --vae my-vae --img-size 128 --scale 0.31 --out latents/photos"""


def declare_latents(parser: argparse.ArgumentParser) -> None:
    """Arguments of `latents`."""
    add = parser.add_argument
    # fmt: off
    add("--dataset", required=True, metavar="NAME",
        help="digits, a folder of parquet files, an image folder, or a timm data set such as hfds/<id>")
    add("--split", default="train", help="default: %(default)s")
    add("--part", default="", metavar="[!]I/N",
        help="the images whose index is I modulo N, with ! all others (default: all images)")
    add("--vae", required=True, metavar="NAME",
        help="pixels; a folder or Hub id of a diffusers AutoencoderKL; or a weight file of MAR's KL-16 (.safetensors, "
        ".ckpt, .pth)")
    add("--scale", type=float, help="factor on the VAE's latents (default: the VAE's scaling_factor)")
    add("--img-size", type=int, required=True, metavar="PIXELS",
        help="side of the images: shorter side resized, centre cropped")
    add("--out", metavar="FOLDER", help="where the latents go")
    add("--shard-size", type=int, metavar="N", help="images a file (default: the folder's, 4096 in a new one)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--workers", type=int, help="processes that decode images (default: one a core, at most 4)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add("--measure-scale", action="store_true", help="only measure and print the scale of the VAE's latents")
    add("--images", type=int, default=1000, metavar="N",
        help="evenly spaced images for --measure-scale; 0 for all (default: %(default)s)")
    # fmt: on


def run_latents(args: argparse.Namespace) -> None:
    """Encodes the data set, or measures the scale."""
    from ..data import LatentCache, describe_dataset, open_dataset
    from ..models import load_codec
    from ..order import CollapseError
    from .evaluate import _cores, _device

    for name, low in {"img_size": 1, "shard_size": 1, "batch_size": 1, "workers": 0, "images": 0}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise CollapseError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not args.out and not args.measure_scale:
        raise CollapseError("--out must name the folder for the latents; only --measure-scale needs none")
    device = _device(args.device)
    workers = min(4, _cores()) if args.workers is None else args.workers
    info = open_dataset(args.dataset, args.split, args.part)
    codec = load_codec(args.vae, args.scale).to(device)
    if args.measure_scale:
        _print_scale(_measure(args, info.dataset, codec, device, workers), codec)
        return
    source = describe_dataset(args.dataset, args.split, args.part)
    cache = LatentCache.build(
        args.out, info.dataset, codec, args.img_size, source, args.shard_size, args.batch_size, device,
        num_classes=info.num_classes, workers=workers,
    )  # fmt: skip
    shape = " x ".join(map(str, cache.latent_shape))
    print(f"latents of {len(cache)} images, {shape} each, {cache.num_classes} classes: {args.out}")


def _measure(args: argparse.Namespace, dataset, codec: PixelCodec | VaeCodec, device, workers) -> LatentStatistics:
    from torch.utils.data import Subset
    from tqdm.auto import tqdm

    from ..data import ImageLoader
    from ..data.latent_scale import latent_scale
    from ..data.latents import ResizedPixels

    count = min(args.images or len(dataset), len(dataset))
    even = [number * len(dataset) // count for number in range(count)]
    loader = ImageLoader(Subset(ResizedPixels(dataset, args.img_size), even), args.batch_size, num_workers=workers)
    return latent_scale(codec, (pixels.to(device).float() / 255 for pixels, _ in tqdm(loader, desc="scale")))


def _print_scale(found: LatentStatistics, codec: PixelCodec | VaeCodec) -> None:
    print(f"recommended scale   {found.scale:.5g} +- {found.difference:.2g} (two halves of {found.images} images)")
    print(f"scale in use        {codec.scale:.5g}: gives a standard deviation of {found.std * codec.scale:.4g}")
    print(f"unscaled latents    mean {found.mean:.4g}, standard deviation {found.std:.4g}")
    print(f"by channel          {' '.join(f'{std:.3g}' for std in found.channel_std)}")
    print(f"go on with          --scale {found.scale:.5g}")
