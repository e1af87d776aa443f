"""Latents of a whole data set, encoded once: what a generator of latents is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T

from ..models.codec import PixelCodec, VaeCodec
from ..order import CollapseError
from .datasets import as_images
from .images import Cover
from .shards import Shards, differences, write_shards
from .sources import same_source
from .units import MapUnits

SHARD_SIZE = 4096  # images a file, of a new folder


def pixel_transform(img_size: int) -> T.Compose:
    """RGB image -> (3, S, S) uint8: shorter side resized to S (bicubic), centre cropped."""
    return T.Compose([Cover(img_size), T.PILToTensor()])


class ResizedPixels(Dataset):
    """The images of a data set as `pixel_transform` makes them, with their labels."""

    def __init__(self, dataset: Dataset, img_size: int):
        self.dataset, self.transform = as_images(dataset), pixel_transform(img_size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


class LatentCache(Dataset):
    """Reads a folder that `build` wrote.

    A VAE's posterior is kept as its mean and standard deviation, of each image and of its mirror image, so that every
    step draws latents anew (as in Li et al., arXiv 2406.11838); pixels are kept as they are. Files are memory-mapped.

    Its samples are (record, index), a record being (2, 2, C, h, w) fp16: mean and deviation, image and mirror image; or
    (3, H, W) uint8 of pixels. A batch of them becomes latents by `latents`; `labels[index]` are the labels. With
    `transform=lambda record: record` it is a data set for `StepLoader` and the train scripts' `Run`.

    Args:
        folder: What `build` wrote.
        codec: That made it; None takes the folder's word.

    Attributes:
        labels: (n,) long. num_classes: Of the labels. latent_shape: (C, h, w). source: What was encoded.

    Raises:
        CollapseError: No cache, one with missing or damaged files, or one of another codec.
    """

    def __init__(self, folder: str | Path, codec: PixelCodec | VaeCodec | None = None):
        self.folder = Path(folder)
        self._layout, self._files = _shards(self.folder).whole()
        if codec is not None and codec.identity != self._layout["codec"]:
            raise CollapseError(
                f"codec: {str(folder)!r} holds latents of {self._layout['codec']}, given is {codec.identity}"
            )
        self._records: dict[int, Tensor] = {}
        labels = []
        for file in self._files:
            _check_layout(file, _read_layout(file), self._layout)
            with safe_open(file, "pt") as shard:
                labels.append(shard.get_tensor("labels"))
        self.labels = torch.cat(labels)
        self.num_classes: int = self._layout["num_classes"] or int(self.labels.max()) + 1
        self.source: str = self._layout["source"]
        identity = self._layout["codec"]
        pixels = identity["kind"] == "pixels"
        self._pixels = PixelCodec(identity["mean"], identity["std"]) if pixels else None
        self.latent_shape: tuple[int, int, int] = tuple(self._shard(0).shape[-3:])

    @classmethod
    def build(
        cls,
        folder: str | Path,
        dataset: Dataset,
        codec: PixelCodec | VaeCodec,
        img_size: int,
        source: str,
        shard_size: int | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        quiet: bool = False,
        num_classes: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> LatentCache | None:
        """Encodes what is not yet in the folder; a killed build goes on after its last whole file.

        Args:
            folder: Is made where it does not exist.
            dataset: Map-style (PIL image, label), see `as_images`.
            codec: Is moved to `device`.
            img_size: Side S of the images in pixels: shorter side resized, centre cropped.
            source: What is encoded, see `describe_dataset`.
            shard_size: Images a file; None for what the folder has, 4096 in a new one.
            num_classes: Of the data set; 0 for one more than the largest label.
            workers: Processes that decode images.
            rank, world: This process and the number of processes, which share the files among them.

        Returns:
            The opened cache; None for one of several processes, which opens the folder when all have finished.

        Raises:
            CollapseError: The folder holds latents of something else, or a number is out of range.
        """
        folder = Path(folder)
        for name, value in {"img_size": img_size, "shard_size": shard_size, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise CollapseError(f"{name}: must be at least 1, got {value}")
        if img_size % codec.stride:
            raise CollapseError(f"img_size: must be a multiple of the codec's stride {codec.stride}, got {img_size}")
        if not len(dataset):
            raise CollapseError("dataset: has no images")
        shards = _shards(folder)
        found = shards.layouts()
        if shard_size is None:
            shard_size = next((layout["shard_size"] for layout in found.values()), SHARD_SIZE)
        layout = {"source": source, "codec": codec.identity, "img_size": img_size, "images": len(dataset),
                  "shard_size": shard_size, "num_classes": num_classes}  # fmt: skip
        for file, other in found.items():
            _check_layout(file, other, layout)
        # the files of a folder say the same, also where it was made by an earlier version, which put it otherwise
        layout = next(iter(found.values()), layout)
        units, codec = MapUnits(dataset, shard_size), codec.to(device)
        files = shards.files(len(units))

        def save(file: Path, unit: int, keys: list[str], labels: Tensor, columns: list[Tensor]) -> None:
            tensors = {"records": columns[0], "labels": labels}
            save_file(tensors, file, metadata={"layout": json.dumps(layout)})

        write_shards(
            files, units, lambda unit: units.size(unit) if files[unit] in found else None,
            lambda unit, pixels: [_encode(pixels, codec, device)], save, pixel_transform(img_size), batch_size,
            workers, rank, world, quiet, "latents",
        )  # fmt: skip
        if world > 1:
            return None
        cache = cls(folder, codec)
        shards.remove_temporary()
        return cache

    def __len__(self) -> int:
        return self._layout["images"]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        shard, row = divmod(index, self._layout["shard_size"])
        return self._shard(shard)[row], index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": {}}  # another process maps the files itself

    def latents(self, records: Tensor, mirrored: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of a batch of records.

        Args:
            records: (B, ...) as the data set gives them, on any device.
            mirrored: (B,) bool: whether the mirror image is taken.
            noise: (B, C, h, w) standard normal, for the draw from a VAE's posterior; pixels need none.

        Returns:
            (B, C, h, w) float32.

        Raises:
            CollapseError: Noise of another shape, or none for a VAE.
        """
        mirrored = mirrored.to(records.device)
        if self._pixels is not None:
            images = torch.where(mirrored.view(-1, 1, 1, 1), records.flip(-1), records)
            return self._pixels.moments(images.float() / 255)[0]
        shape = (len(records), *self.latent_shape)
        if noise is None or tuple(noise.shape) != shape:
            given = None if noise is None else tuple(noise.shape)
            raise CollapseError(f"noise: a draw from the VAE's posterior needs normal noise {shape}, got {given}")
        chosen = records[torch.arange(len(records), device=records.device), :, mirrored.long()].float()
        return chosen[:, 0] + chosen[:, 1] * noise.to(chosen)

    def _shard(self, number: int) -> Tensor:
        if number not in self._records:
            with safe_open(self._files[number], "pt") as shard:
                self._records[number] = shard.get_tensor("records")
        return self._records[number]


def _encode(pixels: Tensor, codec: PixelCodec | VaeCodec, device: torch.device | str) -> Tensor:
    """Records of uint8 images (B, 3, S, S)."""
    if isinstance(codec, PixelCodec):
        return pixels
    images = pixels.to(device).float() / 255
    views = [torch.stack(codec.moments(view), dim=1) for view in (images, images.flip(-1))]
    records = torch.stack(views, dim=2).half().cpu()
    if not records.isfinite().all():
        raise CollapseError(
            f"codec: its latents are not finite in fp16 with scale {codec.scale}; use a VAE in fp32 or bf16, and a "
            "scale that gives them unit variance"
        )
    return records


def _shards(folder: str | Path) -> Shards:
    return Shards(folder, "latents", "safetensors", _read_layout, "folder", "build them to the end first")


def _read_layout(file: Path) -> dict[str, Any]:
    """What a file says that it holds; the length of the file is checked against its header."""
    try:
        with safe_open(file, "pt") as shard:
            return json.loads((shard.metadata() or {})["layout"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CollapseError(
            f"folder: {str(file)!r} is damaged or holds no latents ({error}); build the latents again"
        ) from error


def _check_layout(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, (other, value) in differences(found, wanted).items():
        same = name == "source" and same_source(other, value, wanted["images"])
        if same or name == "num_classes":  # no matter of what is encoded
            continue
        raise CollapseError(
            f"{name}: {str(file)!r} holds latents of {other!r}, needed are those of {value!r}; choose another folder"
        )
