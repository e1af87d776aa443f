"""The latents of a training set, encoded once, by all processes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..data import LatentCache, describe_dataset
from .args import TrainArgs
from .distributed import processes


class NoiseCodec(nn.Module):
    """Stands for a VAE that is not at hand: its latents are noise.

    Args:
        latent_shape: (C, h, w). img_size: Of the images, in pixels.
    """

    scale = 1.0

    def __init__(self, latent_shape: tuple[int, int, int], img_size: int):
        super().__init__()
        self.channels, self.stride = latent_shape[0], img_size // latent_shape[1]
        self.identity = {"kind": "noise"}

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> mean 0 and standard deviation 1, (B, C, h, w) each."""
        side = images.shape[-1] // self.stride
        mean = images.new_zeros(len(images), self.channels, side, side)
        return mean, mean + 1


def data_set_latents(
    args: TrainArgs, folder: str | Path, dataset, codec, img_size: int, num_classes: int
) -> LatentCache:
    """Read the folder of a training set's latents, or make it; every process encodes its share of the files.

    Args:
        args: The script's: which data set this is, and how many processes read it.
        folder: The folder; one of another data set or codec is refused.
        dataset: (PIL image, label).
        codec: See `load_codec`; or a `NoiseCodec`.
        img_size: Side of the images in pixels.
        num_classes: Of the data set; 0: as many as the labels tell.
    """
    state = processes()
    source = describe_dataset(args.dataset, args.split, args.part)
    LatentCache.build(
        folder, dataset, codec, img_size, source, device=state.device, quiet=not state.is_main_process,
        num_classes=num_classes, workers=args.workers, rank=state.process_index, world=state.num_processes,
    )  # fmt: skip
    state.wait_for_everyone()
    return LatentCache(folder, codec)
