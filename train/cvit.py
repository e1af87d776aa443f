"""Train a collapsed vision transformer: from scratch, or from pretrained weights.

    accelerate launch train/cvit.py --dataset digits --model cvit_tiny_patch4_32 --output runs/cvit
    accelerate launch train/cvit.py --dataset path/to/imagenet --model cvit_base_patch16 --pretrained --lr 1e-4

A pretrained ViT learns what tokens of several patches lack, in a hundred steps and without labels:

    accelerate launch train/cvit.py --model vit_base_patch16_224 --pretrained true --dataset path/to/photos \
        --tune sizes --remainder split --area_bias 0.5 --keep_schedule 32,64,128 --lr 1e-4 --steps 100

Each step has a budget of tokens (--keep_schedule), and the model sees only the patches that come first in the order of
their image. Baselines are the same script with another argument: --orderer random (RViT), bayer, halton, centre or
variance; --remainder coarse --coarse_share 1 (the image downscaled to as many tokens); --keep_schedule full (a ViT).

Smaller patches at the same number of tokens, from a model of larger ones: --init runs/patch8 --model_args
'{"patch_size": 4}' --keep_schedule 16,32,64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from timm_collapse import CollapseError, Order, collapse
from timm_collapse.collapse import Collapsed, default_orderer
from timm_collapse.data import OrderedImages, eval_transform, open_dataset, train_transform
from timm_collapse.engine import TrainArgs, create_model, data_set_orders, parse_args, part_for, run_script, start_run
from timm_collapse.evaluation import accuracy_curves, image_batches
from timm_collapse.hub.save import pretrained_source, save_model
from timm_collapse.order import jitter_order, mix_random, parse_keep, resolve_keep

SMOOTHING = 0.1  # of the labels
SIZE_LR = 30  # times the learning rate of pretrained weights: it starts at zero


@dataclass
class Args(TrainArgs):
    """Arguments of CViT."""

    model: str = field(default="cvit_tiny_patch8_64", metadata={"help": "Any cvit_* or collapsible timm architecture."})
    orderer: str = field(
        default="", metadata={"help": "Orderer: registered name, folder or baseline; empty: the model's."}
    )
    keep: str = field(
        default="0.22", metadata={"help": "Budget of the saved model: a share of the patches (.22) or a count (64)."}
    )
    keep_schedule: str = field(
        default="cosine",
        metadata={"help": "Budget of each step: cosine (the paper's: .01 to 1, large ones favoured), uniform, full "
                          "(every patch), fixed (that of --keep), or several with commas between (16,.22,1.0), of "
                          "which one is drawn."},
    )  # fmt: skip
    remainder: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "What stands for the dropped patches: none, fused, coarse, mixed, split, zoom; of several, "
                          "one is drawn each step, and the saved model has the first."},
    )  # fmt: skip
    coarse_share: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "Share of the budget for coarse tokens; of several, as above."}
    )
    area_bias: float = field(
        default=0.0, metadata={"help": "How much tokens of several patches count for their number, see `collapse`."}
    )
    size_embed: bool = field(
        default=False,
        metadata={"help": "Learn what a token's size adds to it, see `Collapsed`: two vectors, zero at first, at "
                          f"{SIZE_LR} times the learning rate."},
    )  # fmt: skip
    tune: str = field(
        default="all",
        metadata={"help": "all: the model, by its labels; sizes: the size embedding alone, without labels, to what the "
                          "model says of the whole image (--distill, 1 where it is 0)."},
    )  # fmt: skip
    order_table: str = field(
        default="",
        metadata={"help": "Folder of the data set's orders, made if missing: nothing is ordered while training, and "
                          "the only augmentation is mirroring."},
    )  # fmt: skip
    jitter: float = field(default=0.0, metadata={"help": "Plackett-Luce temperature of the orders, 0 for none."})
    random_orders: float = field(default=0.0, metadata={"help": "Share of images with a random order."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})
    mixup: float = field(default=0.0, metadata={"help": "Mixup alpha; the mixed image is ordered."})
    distill: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from the model's own output on the whole image."}
    )
    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate factor a layer, from the head down."})
    freeze: int = field(
        default=0, metadata={"help": "So many first blocks, and the embeddings, stay as they are; 0: all is trained."}
    )
    val_split: str = field(default="validation", metadata={"help": "Split for the final accuracy; empty for none."})

    def __post_init__(self):
        super().__post_init__()
        parse_keep(str(self.keep))
        self.budget(0.5)
        self.check_range("jitter", "mixup", "distill", "area_bias", "freeze")
        self.check_range("random_orders", "crop_scale", "layer_decay", high=1)
        if self.tune not in ("all", "sizes"):
            raise CollapseError(f"tune: must be all or sizes, got {self.tune!r}")
        if self.tune == "sizes":
            if "none" in self.remainder:
                raise CollapseError("remainder: must not be none with --tune sizes, which learns of its tokens")
            if self.mixup:
                raise CollapseError("mixup: must be 0 with --tune sizes, which takes no labels")
            self.size_embed, self.distill = True, self.distill or 1.0
        if self.order_table and self.mixup:
            raise CollapseError("order_table: has the orders of single images, so mixup must be 0")

    def budget(self, u: float) -> float | int:
        """The model's `keep` in a step, for a uniform number u in [0, 1)."""
        if self.keep_schedule == "cosine":
            return 1.0 - 0.99 * (1 - math.cos(math.pi / 2 * u))
        if self.keep_schedule == "uniform":
            return 1.0 - 0.99 * u
        if self.keep_schedule == "full":
            return 1.0
        budgets = self.keep if self.keep_schedule == "fixed" else self.keep_schedule
        try:
            budgets = [parse_keep(text) for text in str(budgets).split(",")]
        except CollapseError as error:
            raise CollapseError(
                "keep_schedule: must be cosine, uniform, full, fixed, or ratios in (0, 1] and counts of at least 2, "
                f"with commas between, got {self.keep_schedule!r}"
            ) from error
        return budgets[int(u * len(budgets))]


def main() -> None:
    args = parse_args(Args, __doc__)
    keep = parse_keep(args.keep)

    # the model
    by_labels = args.tune == "all"
    dataset, num_classes = open_dataset(args.dataset, args.split, args.part, labelled=by_labels)
    source = {"pretrained": True, "pretrained_cfg_overlay": pretrained_source(args.init)} if args.init else {}
    cvit = create_model(args, **({"num_classes": num_classes} if by_labels else {}), **source)
    settings = {"keep": keep, "remainder": args.remainder[0], "coarse_share": args.coarse_share[0]}
    settings["area_bias"] = args.area_bias
    if args.orderer or not isinstance(cvit, Collapsed):
        collapse(cvit, args.orderer or default_orderer(args.remainder[0]), **settings)
    else:  # it has its orderer, perhaps one that lies beside its weights
        for name, value in settings.items():
            setattr(cvit, name, value)
    if args.size_embed:
        cvit.make_size_embed(True)
    orderer, cfg = args.orderer or cvit._model_args["orderer"], cvit.pretrained_cfg
    size = cvit.patch_embed.img_size[0] if hasattr(cvit, "patch_embed") else cfg["input_size"][-1]  # NaFlexVit: any
    grid = cvit.image_grid(torch.empty(1, 3, size, size))
    num_patches = grid[0] * grid[1]
    check_budgets(args, cvit, grid)
    freeze_first(cvit, args.freeze)
    if not by_labels:
        cvit.requires_grad_(False)
    if sized := cvit.size_embed is not None:
        cvit.size_embed.requires_grad_(False)  # a group of its own
    groups = param_groups_layer_decay(cvit, args.weight_decay, cvit.no_weight_decay(), layer_decay=args.layer_decay)
    if sized:
        groups.append({"params": [cvit.size_embed.requires_grad_()], "weight_decay": 0.0, "lr_scale": SIZE_LR})

    # the images; with a table of orders, (image, label, ranks)
    plain = eval_transform(size, cfg["mean"], cfg["std"])
    transform = train_transform(size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    images_in_all, table = len(dataset), None
    if args.order_table:
        dataset = part_for(args, dataset)
        own = cvit.orderer.grid is not None and not cvit.orderer.refine  # then its own grid says it all
        table_grid = cvit.orderer.grid if own else grid
        compute = partial(cvit.compute_order, grid=table_grid)
        table = data_set_orders(
            args, args.order_table, orderer, cvit.orderer, dataset, plain, (size, size), table_grid, compute
        )
        dataset, transform = OrderedImages(dataset, table, plain), None
    mixup = Mixup(args.mixup, label_smoothing=SMOOTHING, num_classes=num_classes) if args.mixup else None

    # where all patches are kept, the size embedding has no part in the output
    run = start_run(args, cvit, dataset, transform, images_in_all, param_groups=groups, find_unused=sized)
    for images, labels, *ranks in run:
        b = len(images)
        if mixup:
            images, labels = mixup(images, labels)

        # which patches are seen: a budget, an order, and what stands for the others
        cvit.keep = args.budget(run.random.uniform())
        cvit.remainder = args.remainder[run.random.randint(0, len(args.remainder))]
        cvit.coarse_share = args.coarse_share[run.random.randint(0, len(args.coarse_share))]
        places = resolve_keep(cvit.keep, num_patches)
        if places == num_patches:
            order = None  # all patches: no order is computed
        elif orderer == "random":
            order = Order(run.random.rand(b, num_patches), grid)
        elif not (table or args.jitter or args.random_orders):
            order = None  # the model orders them itself
        else:
            if table:
                order = Order.from_ranks(*ranks, table.grid).resample(grid, cvit.orderer.spread)
            else:
                order = cvit.compute_order(images, upto=places)
            order = jitter_order(order, args.jitter, run.random.rand(b, num_patches))
            order = mix_random(order, args.random_orders, run.random.rand(b, num_patches + 1))

        with run.accelerator.autocast():
            logits, metrics = run.model(images, order=order).float(), {}
            loss = logits.new_zeros(())
            if by_labels:
                loss = F.cross_entropy(logits, labels, label_smoothing=0.0 if mixup else SMOOTHING)
                metrics["loss"] = loss.detach()
            if args.distill:
                cvit.keep = 1.0
                with torch.no_grad():
                    whole = cvit(images).float().softmax(-1)
                metrics["divergence"] = F.kl_div(logits.log_softmax(-1), whole, reduction="batchmean")
                loss = loss + args.distill * metrics["divergence"]
        run.step(loss, metrics)

    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)  # before the accuracy is measured, which may take long
        if args.val_split:
            batches = image_batches(open_dataset(args.dataset, args.val_split, labelled=True).dataset, plain)
            share = keep if keep <= 1 else keep / num_patches
            curve = accuracy_curves({"cvit": model}, batches, sorted({1.0, 0.5, share}))["cvit"]
            accuracy = dict(zip(curve.keeps, curve.top1))
            print("top-1:", ", ".join(f"{value:.1f}% at keep {keep:g}" for keep, value in accuracy.items()))
            save_model(model, args.output, recipe=args, validation_top1=accuracy)


def freeze_first(vit: nn.Module, blocks: int) -> None:
    """No gradients for the embeddings and the first blocks of a timm model; 0: all have them.

    Raises:
        CollapseError: More blocks than there are.
    """
    if not blocks:
        return
    layers = group_parameters(vit, vit.group_matcher(), reverse=True)  # name -> 0, 1 (block 0) ...
    if blocks > (depth := len(vit.blocks)):
        raise CollapseError(f"freeze: must be in [0, {depth}], the model's blocks, got {blocks}")
    for name, parameter in vit.named_parameters():
        if layers[name] <= blocks:
            parameter.requires_grad_(False)


def check_budgets(args: Args, cvit: Collapsed, grid: tuple[int, int]) -> None:
    """Raises CollapseError where the model has no tokens for a budget, before the training meets it."""
    keeps = [parse_keep(args.keep), *(args.budget(percent / 100) for percent in range(100)), args.budget(1 - 1e-9)]
    counts = [resolve_keep(keep, grid[0] * grid[1]) for keep in keeps]
    if args.tune == "sizes" and max(counts[1:]) == grid[0] * grid[1]:
        raise CollapseError(
            f"keep_schedule: must be of less than all {max(counts)} patches with --tune sizes, such as 32,64, got "
            f"{args.keep_schedule!r}"
        )
    smallest = min(counts)
    for share in reversed(args.coarse_share):  # the first ones stay
        cvit.coarse_share = share
        for remainder in reversed(args.remainder):
            cvit.remainder = remainder
            cvit.plan(smallest, grid)  # what has tokens for the smallest budget has them for all


if __name__ == "__main__":
    run_script(main)
