"""A ViT-Ti/8 for 64 px images, trained against the clock with random drop: a teacher and a judge for small experiments.

All images are decoded once and stay on the GPU as bytes, where they are augmented, too: random resized crops, mirrored,
of other brightness, contrast and saturation; mixup or cutmix; label smoothing. Each step keeps all patches or a random
share of them (RViT), so that the model can judge what any order leaves visible. AdamW, bf16, a moving average of the
weights; the learning rate follows the share of the time that is spent: the end of the time ends the schedule, too.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from gpu_models import Size, device
from gpu_runner import Bench, Box
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_collapse import Order
from timm_collapse.data import open_dataset
from timm_collapse.evaluation import accuracy_curves, image_batches, with_orderer
from timm_collapse.evaluation.cost import autocast
from timm_collapse.evaluation.report import relative_paths
from timm_collapse.hub.files import WEIGHTS_FILE
from timm_collapse.hub.save import save_model
from timm_collapse.models.normalisation import Normalisation
from timm_collapse.models.registry import TIN_MEAN, TIN_STD, pixel_cfg

SIDE, PATCH = 64, 8
ARCHITECTURE, FOLDER = "vit_tiny_patch16_224", "vit_tiny_patch8_64"
RECIPE: dict[str, Any] = {
    "lr": 1.5e-3, "warm_up": 0.05, "weight_decay": 0.05, "clip": 1.0, "drop_path": 0.1, "ema": 0.9995, "mixup": 0.8,
    "cutmix": 1.0, "mix_share": 0.8, "label_smoothing": 0.1, "crop_scale": (0.3, 1.0), "jitter": 0.3,
    "keep_all_share": 0.4, "least_keep": 0.1,
}  # fmt: skip
KEEPS = (1.0, 0.5, 0.22)
SAVE_EVERY = 60.0  # seconds between the states that outlive a kill


def to_bytes(image: Image.Image) -> Tensor:
    """(3, 64, 64) uint8: the image shrunk or enlarged to cover the square, and its centre."""
    if image.size != (SIDE, SIDE):
        image = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1)


def decode(name: str, split: str) -> tuple[Tensor, Tensor, int]:
    """All images of a data set (n, 3, 64, 64) uint8 and their labels (n,), on the device; number of classes."""
    dataset, num_classes = open_dataset(name, split, labelled=True)
    images, labels = zip(*image_batches(dataset, to_bytes, batch_size=1000))
    return torch.cat(images).to(device()), torch.cat(labels).to(device()), num_classes


def normalise(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 255] -> what the model takes."""
    return Normalisation(TIN_MEAN, TIN_STD).apply(pixels.float() / 255)


def augment(images: Tensor, scale: tuple[float, float], jitter: float) -> Tensor:
    """Random resized crops, half of them mirrored, with other brightness, contrast and saturation.

    Args:
        images: (B, 3, S, S) uint8.
        scale: Of the crops' areas; their aspect ratios are in (3/4, 4/3).
        jitter: Largest relative change of brightness, contrast and saturation.

    Returns:
        (B, 3, S, S) float in [0, 255].
    """
    b = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(b, device=images.device) * (high - low) + low

    area, ratio = uniform(*scale), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    theta = torch.zeros(b, 2, 3, device=images.device)
    theta[:, 0, 0] = width * (uniform(0, 1) < 0.5).float().mul(2).sub(1)
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = F.grid_sample(images.float(), places, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (uniform(1 - jitter, 1 + jitter).view(b, 1, 1, 1) for _ in range(3))
    x = x * brightness
    x = x.lerp(x.mean((1, 2, 3), keepdim=True), 1 - contrast)
    return x.lerp(x.mean(1, keepdim=True), 1 - saturation).clamp(0, 255)


def learning_rate(share: float) -> float:
    """By the share of the time that is spent: linear warm-up, then a cosine down to a hundredth."""
    if share < RECIPE["warm_up"]:
        return RECIPE["lr"] * max(share / RECIPE["warm_up"], 0.01)
    rest = (share - RECIPE["warm_up"]) / (1 - RECIPE["warm_up"])
    return RECIPE["lr"] * (0.01 + 0.99 * (1 + math.cos(math.pi * rest)) / 2)


def draw_keep(draws: random.Random) -> float:
    """Share of the patches that a step keeps."""
    return 1.0 if draws.random() < RECIPE["keep_all_share"] else draws.uniform(RECIPE["least_keep"], 1.0)


def build(num_classes: int, size: Size, **options: Any) -> nn.Module:
    """The architecture; its configuration says how images are normalised, wherever it is loaded from."""
    cfg = pixel_cfg("", SIDE, num_classes=num_classes, first_conv="patch_embed.proj", classifier="head")
    shape = {"img_size": SIDE, "patch_size": PATCH, **size.train_args}
    vit = timm.create_model(ARCHITECTURE, pretrained_cfg=cfg, num_classes=num_classes, **shape, **options)
    vit.model_args = shape
    return vit.to(device())


def save(average: nn.Module, num_classes: int, size: Size, folder: Path, **facts: Any) -> None:
    """Write the averaged weights in bf16, as a plain timm model's folder."""
    vit = build(num_classes, size)
    vit.load_state_dict(average.state_dict())
    save_model(vit.to(torch.bfloat16), folder, recipe=RECIPE, **facts)


def val_batches(images: Tensor, labels: Tensor, batch: int = 1000):
    return [(normalise(images[i : i + batch]), labels[i : i + batch]) for i in range(0, len(images), batch)]


def top1(models: dict[str, nn.Module], images: Tensor, labels: Tensor, keeps: tuple[float, ...]) -> dict[str, Any]:
    """Model -> keep -> top-1 in percent."""
    precision = "bf16" if device().type == "cuda" else "no"
    curves = accuracy_curves(models, val_batches(images, labels), keeps, precision, device(), progress=False)
    return {name: dict(zip(map("{:g}".format, curve.keeps), curve.top1)) for name, curve in curves.items()}


def train(data: str, output: Path, size: Size, bench: Bench, reserve: float = 12.0) -> None:
    """Train until the time is up but for a reserve of seconds, then save and measure what was saved.

    Args:
        data: Any data set of `open_dataset` with a training and a validation split.
        output: The model's folder is made in it.
        size: Of the model and of a step.
        bench: With the time that all of this may take.
        reserve: For saving and measuring.
    """
    torch.manual_seed(0)
    draws, folder = random.Random(0), output / FOLDER
    torch.set_float32_matmul_precision("high")
    images, labels, num_classes = decode(data, "train")
    val_images, val_labels, _ = decode(data, "validation")
    decoded = bench.box.clock() - bench.box.start
    vit = build(num_classes, size, drop_path_rate=RECIPE["drop_path"])
    student = with_orderer(vit, "random").train()
    grid = vit.patch_embed.grid_size
    ema = ModelEmaV3(vit, RECIPE["ema"], use_warmup=True)
    groups = param_groups_weight_decay(vit, RECIPE["weight_decay"], vit.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, fused=device().type == "cuda")
    mixup = Mixup(RECIPE["mixup"], RECIPE["cutmix"], prob=RECIPE["mix_share"], num_classes=num_classes,
                  label_smoothing=RECIPE["label_smoothing"])  # fmt: skip
    batch = min(size.train_batch, len(images) // 2 * 2)
    save(vit, num_classes, size, folder)  # where that is not possible, it is better found now
    box, step, saved, history = Box(bench.box.left - reserve, bench.box.clock), 0, 0.0, []
    while box.left > 0:
        shuffled = torch.randperm(len(images), device=device())
        for chosen in shuffled[: len(images) // batch * batch].split(batch):
            if box.left <= 0:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(box.share)
            x, y = mixup(normalise(augment(images[chosen], RECIPE["crop_scale"], RECIPE["jitter"])), labels[chosen])
            student.keep = draw_keep(draws)
            order = Order.unchecked(torch.rand(batch, vit.patch_embed.num_patches, device=x.device), grid)
            with autocast(device(), "bf16" if device().type == "cuda" else "no"):
                loss = -(y * student(x, order=order).float().log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vit.parameters(), RECIPE["clip"])
            optimizer.step()
            step += 1
            ema.update(vit, step)
            if bench.box.clock() - box.start - saved > SAVE_EVERY:
                saved = bench.box.clock() - box.start
                history.append(_progress(step, batch, images, loss, saved))
                history[-1]["top1"] = top1({"all": ema.module}, val_images, val_labels, (1.0,))["all"]["1"]
                save(ema.module, num_classes, size, folder, history=history)
                bench.measure("history", lambda: history)
    if not step:
        raise TimeoutError(f"decoding took {decoded:.0f} s, and no time was left for a step")
    seconds = bench.box.clock() - box.start
    final = _progress(step, batch, images, loss, seconds)
    facts = {"data": relative_paths(data), "decode_seconds": decoded, **final, "batch": batch}
    save(ema.module, num_classes, size, folder, history=history, **facts)
    facts["weights_mb"] = round((folder / WEIGHTS_FILE).stat().st_size / 1e6, 2)
    bench.measure("training", lambda: facts)
    bench.measure("top1", lambda: judged(folder, val_images, val_labels))


def _progress(step: int, batch: int, images: Tensor, loss: Tensor, seconds: float) -> dict[str, float]:
    if not math.isfinite(value := float(loss.detach())):
        raise FloatingPointError(f"the loss is {value} after {step} steps")
    rate = step * batch / seconds
    return {"seconds": round(seconds, 1), "steps": step, "epochs": round(step * batch / len(images), 1),
            "images_per_second": round(rate), "loss": round(value, 4)}  # fmt: skip


def judged(folder: Path, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 of what was saved, as everybody will load it, on random and Bayer orders."""
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.manual_seed(0)
    return top1({name: with_orderer(vit, name) for name in ("random", "bayer")}, images, labels, KEEPS)
