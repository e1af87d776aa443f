"""Latents of a whole data set, encoded once: what a generator of latents is trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms as T

from ..models.codec import PixelCodec, VaeCodec
from ..order import CollapseError


class ResizedPixels(Dataset):
    """Images with the shorter side resized to S (bicubic) and the centre cropped: (uint8 (3, S, S), label)."""

    def __init__(self, dataset: Dataset, img_size: int):
        self.dataset = dataset
        resize = T.Resize(img_size, interpolation=T.InterpolationMode.BICUBIC)
        self.transform = T.Compose([resize, T.CenterCrop(img_size), T.PILToTensor()])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image.convert("RGB")), int(label)


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
        found = sorted(self.folder.glob("latents-*.safetensors"))
        if not found:
            raise CollapseError(f"folder: {str(folder)!r} holds no latents; build them first")
        self._layout = _read_layout(found[0])
        if codec is not None and codec.identity != self._layout["codec"]:
            raise CollapseError(
                f"codec: {str(folder)!r} holds latents of {self._layout['codec']}, given is {codec.identity}"
            )
        self._files = _shard_files(self.folder, self._layout)
        if missing := [file.name for file in self._files if not file.is_file()]:
            raise CollapseError(
                f"folder: {str(folder)!r} lacks {len(missing)} of {len(self._files)} files of latents, the first "
                f"{missing[0]}; build them to the end first"
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
        shard_size: int = 4096,
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
            dataset: Map-style (PIL image, label).
            codec: Is moved to `device`.
            img_size: Side S of the images in pixels: shorter side resized, centre cropped.
            source: What is encoded, in words that no other data set has.
            shard_size: Images a file.
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
            if value < 1:
                raise CollapseError(f"{name}: must be at least 1, got {value}")
        if img_size % codec.stride:
            raise CollapseError(f"img_size: must be a multiple of the codec's stride {codec.stride}, got {img_size}")
        if not len(dataset):
            raise CollapseError("dataset: has no images")
        layout = {"source": source, "codec": codec.identity, "img_size": img_size, "images": len(dataset),
                  "shard_size": shard_size, "num_classes": num_classes}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        whole = set()
        for file in folder.glob("latents-*.safetensors"):
            try:
                found = _read_layout(file)
            except CollapseError:
                continue  # damaged: encoded again
            _check_layout(file, found, layout)
            whole.add(file.name)
        jobs = []
        for number, file in list(enumerate(_shard_files(folder, layout)))[rank::world]:
            images = range(number * shard_size, min((number + 1) * shard_size, len(dataset)))
            jobs.append((file, images))
        _encode_shards(jobs, whole, ResizedPixels(dataset, img_size), codec.to(device), layout, batch_size, device,
                       workers, quiet)  # fmt: skip
        return cls(folder, codec) if world == 1 else None

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


def _encode_shards(jobs, whole, pixels, codec, layout, batch_size, device, workers, quiet) -> None:
    """Writes those of the jobs (file, range of images) whose file is not among the whole ones."""
    from tqdm.auto import tqdm

    left = [(file, images) for file, images in jobs if file.name not in whole]
    total = sum(len(images) for _, images in jobs)
    done = total - sum(len(images) for _, images in left)
    with tqdm(total=total, initial=done, desc="latents", unit="image", disable=quiet, dynamic_ncols=True) as bar:
        for file, images in left:
            records, labels = [], []
            for batch, batch_labels in DataLoader(Subset(pixels, images), batch_size, num_workers=workers):
                records.append(_encode(batch, codec, device))
                labels.append(batch_labels)
                bar.update(len(batch))
            tensors = {"records": torch.cat(records), "labels": torch.cat(labels)}
            temporary = file.with_suffix(".tmp")
            save_file(tensors, temporary, metadata={"layout": json.dumps(layout)})
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())  # else a crash may leave the name of a file without its content
            os.replace(temporary, file)


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


def _shard_files(folder: Path, layout: dict[str, Any]) -> list[Path]:
    count = -(-layout["images"] // layout["shard_size"])
    return [folder / f"latents-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]


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
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CollapseError(
                f"{name}: {str(file)!r} holds latents of {found.get(name)!r}, needed are those of {value!r}; choose "
                "another folder"
            )
