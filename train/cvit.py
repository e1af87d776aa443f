"""Train a collapsed vision transformer: from scratch, or from pretrained weights.

    accelerate launch train/cvit.py --dataset digits --model cvit_tiny_patch4_32 --output runs/cvit
    accelerate launch train/cvit.py --dataset path/to/imagenet --model cvit_base_patch16 --pretrained --lr 1e-4

Baselines are the same script with another argument: --orderer random (RViT), bayer, halton, centre or variance;
--remainder coarse --coarse_share 1 (the image downscaled to as many tokens); --keep_schedule full (a plain ViT).

Smaller patches at the same number of tokens, from a model of larger ones: --init runs/patch8 --model_args
'{"patch_size": 4}' --keep_schedule 16,32,64.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_layer_decay

from timm_collapse import CollapseError, collapse
from timm_collapse.data import (
    Indexed,
    OrderTable,
    describe_dataset,
    eval_transform,
    labels_of,
    open_dataset,
    train_transform,
)
from timm_collapse.engine import Run, TrainArgs, data_set_orders, order_source, parse_args, part_for, run_script
from timm_collapse.evaluation import accuracy_curves, image_batches
from timm_collapse.hub.save import save_model
from timm_collapse.order import jitter_order, mix_random, parse_keep, resolve_keep


@dataclass
class Args(TrainArgs):
    """Arguments of CViT."""

    model: str = field(default="cvit_tiny_patch8_64", metadata={"help": "Any cvit_* or collapsible timm architecture."})
    model_args: str = field(default="{}", metadata={"help": "JSON of further architecture arguments."})
    pretrained: bool = field(default=False, metadata={"help": "Start from the architecture's pretrained weights."})
    init: str = field(
        default="",
        metadata={"help": "Start from the weights of this folder; patch and position embeddings are resampled to the "
                          "new size, and the head is new where the number of classes differs."},
    )  # fmt: skip
    orderer: str = field(
        default="", metadata={"help": "Orderer: registered name, folder or baseline; empty: the model's."}
    )
    remainder: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "What becomes of dropped patches: none, fused, coarse, mixed; of several, one is drawn each step."
        },
    )
    coarse_share: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "Share of the budget for coarse tokens; one for each step."}
    )
    keep: float = field(default=0.22, metadata={"help": "Keep ratio that the saved model has."})
    keep_schedule: str = field(
        default="cosine",
        metadata={"help": "Tokens of each step: cosine (the paper's mask rate: 0 to .99, low ones favoured), uniform, "
                          "full (nothing is masked), or budgets with commas between, one of which is drawn each step: "
                          "ratios (.22) or counts (64)."},
    )  # fmt: skip
    jitter: float = field(default=0.0, metadata={"help": "Plackett-Luce temperature of the orders, 0 for none."})
    random_orders: float = field(default=0.0, metadata={"help": "Share of images with a random order."})
    order_table: str = field(
        default="",
        metadata={"help": "Folder of the data set's orders, made if missing: nothing is ordered while training, and "
                          "the only augmentation is mirroring."},
    )  # fmt: skip
    dataset: str = field(default="digits", metadata={"help": "digits, a folder, or a timm data set; a+b joins."})
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    part: str = field(default="", metadata={"help": "'i/n' or '!i/n' of the split."})
    val_split: str = field(default="validation", metadata={"help": "Split for the final accuracy; empty for none."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})
    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing."})
    mixup: float = field(default=0.0, metadata={"help": "Mixup alpha; the mixed image is ordered."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix alpha."})
    distill: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from the model's own output on the whole image."}
    )
    grad_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: long sequences in less memory."}
    )
    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate factor a layer, from the head down."})

    def __post_init__(self):
        super().__post_init__()
        self.budget(0.5)  # checks the schedule
        if self.order_table and (self.mixup or self.cutmix):
            raise CollapseError("order_table: orders of single images, so mixup and cutmix must be 0")

    def budget(self, u: float) -> float | int:
        """The model's `keep` in a step, for a uniform number u in [0, 1)."""
        if self.keep_schedule == "cosine":
            return 1.0 - 0.99 * (1 - math.cos(math.pi / 2 * u))
        if self.keep_schedule == "uniform":
            return 1.0 - 0.99 * u
        if self.keep_schedule == "full":
            return 1.0
        try:
            budgets = [parse_keep(text) for text in self.keep_schedule.split(",")]
        except CollapseError as error:
            raise CollapseError(
                "keep_schedule: must be cosine, uniform, full, or ratios in (0, 1] and counts of at least 2, with "
                f"commas between, got {self.keep_schedule!r}"
            ) from error
        return budgets[int(u * len(budgets))]


def main() -> None:
    args = parse_args(Args, __doc__)
    dataset, num_classes = open_dataset(args.dataset, args.split, args.part, labelled=True)
    source = {"pretrained_cfg_overlay": weights_of(args.init)} if args.init else {}
    model = timm.create_model(
        args.model, args.pretrained or bool(args.init), num_classes=num_classes, **source, **json.loads(args.model_args)
    )
    orderer = args.orderer or getattr(model, "_model_args", {}).get("orderer", "collapse_ranker_tiny_224")
    collapse(model, orderer, args.keep, args.remainder[0], args.coarse_share[0])
    model.set_grad_checkpointing(args.grad_checkpointing)
    check_budgets(args, model)
    cfg, size = model.pretrained_cfg, model.patch_embed.img_size[0]
    plain = eval_transform(size, cfg["mean"], cfg["std"])
    augment = train_transform(size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(), layer_decay=args.layer_decay)
    images = len(dataset)
    if args.order_table:
        dataset = part_for(args, dataset)
        labels = torch.as_tensor(labels_of(dataset))
        run = Run(args, model, Indexed(dataset), plain, param_groups=groups, images=images)
        table = orders_of_dataset(args, run, orderer, dataset, plain)
    else:
        run = Run(args, model, dataset, augment, param_groups=groups)
    mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
    cvit = run.bare
    random_orders = 1.0 if orderer == "random" else args.random_orders  # drawn from the run's seed, not the orderer's
    for images, targets in run:
        b, n = len(images), cvit.patch_embed.num_patches
        cvit.keep = args.budget(run.uniform())
        cvit.remainder = args.remainder[run.randint(0, len(args.remainder))]
        cvit.coarse_share = args.coarse_share[run.randint(0, len(args.coarse_share))]
        if args.order_table:
            mirrored = run.rand(b) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
            order, targets = table.lookup(targets, mirrored).to(images.device), labels[targets.cpu()].to(images.device)
            order = order.resample(cvit.patch_embed.grid_size, cvit.orderer.spread)
        elif args.mixup or args.cutmix:
            images, targets = mix(images, targets)
            order = cvit.compute_order(images)
        else:
            order = cvit.compute_order(images)
        order = jitter_order(order, args.jitter, run.rand(b, n))
        order = mix_random(order, random_orders, run.rand(b, n + 1))
        with run.accelerator.autocast():
            logits = run.model(images, order=order).float()
            smoothing = args.smoothing if targets.ndim == 1 else 0.0
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
            metrics = {"loss": loss.detach()}
            if args.distill:
                divergence = F.kl_div(logits.log_softmax(-1), whole_image(cvit, images), reduction="batchmean")
                loss = loss + args.distill * divergence
                metrics["divergence"] = divergence
        run.step(loss, metrics)
    model = run.finish()
    model.keep, model.remainder, model.coarse_share = args.keep, args.remainder[0], args.coarse_share[0]
    if run.is_main:
        save_model(model, args.output, recipe=args)
        if args.val_split:
            batches = image_batches(open_dataset(args.dataset, args.val_split, labelled=True).dataset, plain)
            curve = accuracy_curves({"cvit": model}, batches, sorted({1.0, 0.5, args.keep}))["cvit"]
            accuracy = dict(zip(curve.keeps, curve.top1))
            print("top-1:", ", ".join(f"{value:.1f}% at keep {keep:g}" for keep, value in accuracy.items()))
            save_model(model, args.output, recipe=args, validation_top1=accuracy)


def check_budgets(args: Args, model) -> None:
    """Raises CollapseError where the model has no tokens for a budget, before the training meets it."""
    grid = model.patch_embed.grid_size
    quantiles = (*(step / 100 for step in range(100)), 1 - 1e-9)
    budgets = [resolve_keep(keep, grid[0] * grid[1]) for keep in (args.keep, *map(args.budget, quantiles))]
    for remainder in args.remainder:
        model.remainder = remainder
        model.plan(min(budgets), grid)  # what has tokens for the smallest budget has them for all


def weights_of(folder: str) -> dict:
    """A saved model as the source of an architecture's pretrained weights, in timm's terms."""
    file, config = Path(folder) / "model.safetensors", Path(folder) / "config.json"
    if not file.is_file() or not config.is_file():
        raise CollapseError(f"init: {folder} has no saved model (config.json and model.safetensors)")
    classes = json.loads(config.read_text())["num_classes"]
    return {"file": str(file), "num_classes": classes, "first_conv": "patch_embed.proj", "classifier": "head"}


def orders_of_dataset(args: Args, run: Run, orderer: str, dataset, transform) -> OrderTable:
    """The orders of the training images, on the orderer's own grid if that says it all, see `data_set_orders`."""
    cvit, described = run.bare, describe_dataset(args.dataset, args.split, args.part)
    size, grid = cvit.patch_embed.img_size, cvit.patch_embed.grid_size
    if cvit.orderer.grid is not None and not cvit.orderer.refine:
        grid = cvit.orderer.grid
    source = order_source(described, len(dataset), size, grid, orderer, cvit.orderer)
    return data_set_orders(
        run, args.order_table, source, dataset, transform, cvit.orderer, partial(cvit.compute_order, grid=grid)
    )


@torch.no_grad()
def whole_image(cvit, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities of the model itself where it sees every patch."""
    keep, cvit.keep = cvit.keep, 1.0
    cvit.eval()
    probabilities = cvit(images).float().softmax(-1)
    cvit.train()
    cvit.keep = keep
    return probabilities


if __name__ == "__main__":
    run_script(main)
