"""Train MAR or CMAR, the masked generator: from scratch, or fine-tuned in collapse order.

    accelerate launch train/cmar.py                                        # digits, minutes on a CPU
    accelerate launch train/cmar.py --dataset path/to/cifar10 --model mar_tiny_patch4_32 --orderer random
    accelerate launch train/cmar.py --dataset path/to/imagenet --model cmar_base --init mar_base.pth \\
        --vae xwen99/mar-vae-kl16 --steps 24000 --batch_size 32 --lr 1e-7 --warmup 0.1 --ema 0.99999 --precision bf16

A MAR is the same network as a CMAR: it sees random orders (--orderer random). With any other orderer, the patches that
come late in the image's collapse order are masked, and those that come next are learnt from those that come early;
--random_orders of the samples see a random order. With --predict_steps 0 all masked patches are learnt, as published;
but the last ones are the easy ones, and such a model takes the next one for too smooth (docs/results.md).

Latents are cached once (--latents), and so are the orders (--order_table); the orders of the training images become the
order bank that is saved beside the weights and that `generate` draws from.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch

from timm_collapse import ClassOrderBank, CollapseError, CollapseOrder
from timm_collapse.data import LatentCache, OrderTable, describe_dataset, eval_transform, open_dataset
from timm_collapse.engine import (
    NoiseCodec,
    Run,
    TrainArgs,
    data_set_orders,
    note,
    order_source,
    parse_args,
    part_for,
    processes,
    run_script,
)
from timm_collapse.hub.mar_checkpoints import load_mar_weights
from timm_collapse.hub.save import save_model
from timm_collapse.models import MAR
from timm_collapse.models.diffusion_process import NUM_TIMESTEPS
from timm_collapse.order import Order, jitter_order, mix_random, tokens_per_step
from timm_collapse.order.masking import mask_rate


@dataclass
class Args(TrainArgs):
    """Arguments of CMAR."""

    model: str = field(default="cmar_mini_patch1_8", metadata={"help": "Registered mar_* or cmar_* architecture."})
    model_args: str = field(default="{}", metadata={"help": "JSON of further architecture arguments."})
    init: str = field(
        default="", metadata={"help": "Start from these weights: a folder, a .safetensors or an official .pth (EMA)."}
    )
    init_ema: bool = field(default=True, metadata={"help": "Of an official .pth take the EMA weights."})
    vae: str = field(default="", metadata={"help": "pixels, a Hub id, folder or file; empty: the architecture's."})
    vae_scale: float = field(default=0.0, metadata={"help": "With --vae: factor on its latents; 0: its own."})
    latents: str = field(default="", metadata={"help": "Folder of cached latents, made if missing; empty: in output."})
    orderer: str = field(
        default="collapse_ranker_tiny",
        metadata={"help": "Orderer: registered name, folder or baseline; random trains a MAR."},
    )
    order_table: str = field(
        default="", metadata={"help": "Folder of the data set's orders, made if missing; empty: in output."}
    )
    random_orders: float = field(default=0.1, metadata={"help": "Share of samples with a random order."})
    jitter: float = field(default=0.0, metadata={"help": "Plackett-Luce temperature of the orders, 0 for none."})
    mirror: float = field(
        default=-1.0, metadata={"help": "Share of mirrored images; -1: half, but none of digits, which it would spoil."}
    )
    mask_ratio: str = field(
        default="truncnorm", metadata={"help": "Distribution of the mask ratio: truncnorm (MAR's), cosine, uniform."}
    )
    mask_ratio_min: float = field(default=0.7, metadata={"help": "Smallest mask ratio; MAR's is .7."})
    predict_steps: int = field(
        default=-1,
        metadata={"help": "0: the loss is of all masked tokens. T: the mask is that of one of T sampling steps, the "
                          "loss that of the tokens which it generates; mask_ratio is not used then. -1: 16 where "
                          "--init is fine-tuned along collapse orders, else 0."},
    )  # fmt: skip
    bank_per_class: int = field(default=128, metadata={"help": "Real orders a class in the order bank; 0: no bank."})
    dataset: str = field(default="digits", metadata={"help": "digits, a folder, or a timm data set; a+b joins."})
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    part: str = field(default="", metadata={"help": "'i/n' or '!i/n' of the split."})

    def __post_init__(self):
        super().__post_init__()
        mask_rate(self.mask_ratio, 0.5, self.mask_ratio_min)  # checks both
        if self.mirror == -1:
            self.mirror = 0.0 if self.dataset == "digits" else 0.5
        if not 0 <= self.mirror <= 1:
            raise CollapseError(f"mirror: must be in [0, 1], or -1, got {self.mirror}")
        if self.predict_steps == -1:
            # from scratch, the few tokens of a step teach too slowly
            self.predict_steps = 16 if self.init and self.orderer != "random" else 0
        if self.random_orders > 1:
            raise CollapseError(f"random_orders: must be at most 1, got {self.random_orders}")
        for name in ("random_orders", "jitter", "bank_per_class", "predict_steps"):
            if getattr(self, name) < 0:
                raise CollapseError(f"{name}: must be at least 0, got {getattr(self, name)}")


def main() -> None:
    args = parse_args(Args, __doc__)
    conditional = json.loads(args.model_args).get("class_num") != 0
    dataset, num_classes = open_dataset(args.dataset, args.split, args.part, labelled=conditional)
    vae = {"vae": args.vae, "vae_scale": args.vae_scale} if args.vae else {}
    if args.vae and args.vae != "pixels":
        vae["latent_bound"] = 0.0  # only pixels are bounded
    model: MAR = timm.create_model(args.model, **{"class_num": num_classes, **vae, **json.loads(args.model_args)})
    if args.init:
        load_mar_weights(model, args.init, ema=args.init_ema)
    groups = parameter_groups(model, args.weight_decay)
    images, dataset = len(dataset), part_for(args, dataset)
    cache = cached_latents(args, dataset, model, num_classes)
    run = Run(args, model, cache, identity, param_groups=groups, images=images)
    table = None if args.orderer == "random" else orders_of_dataset(args, run, dataset)
    labels, length = cache.labels, model.seq_len
    for records, index in run:
        batch = len(records)
        mirrored = run.rand(batch) < args.mirror
        latents = cache.latents(records, mirrored, run.randn(batch, *cache.latent_shape))
        if table:
            order = jitter_order(table.lookup(index, mirrored), args.jitter, run.rand(batch, length).cpu())
            order = mix_random(order, args.random_orders, run.rand(batch, length + 1).cpu())
        else:
            order = Order(run.rand(batch, length), model.grid)
        masked, predicted = counts(args, run, length)
        shape = (model.diffusion_batch_mul, predicted)
        t = (run.rand(batch, *shape) * NUM_TIMESTEPS).long().transpose(0, 1)
        noise = run.randn(batch, *shape, model.token_dim).transpose(0, 1)
        drop = run.rand(batch) < model.label_drop_prob
        indices = order.indices.to(latents.device)
        with run.accelerator.autocast():
            out = run.model(latents, labels[index.cpu()].to(latents.device), indices, masked, drop, t, noise, predicted)
        run.step(out["loss"], out)
    model = run.finish()
    if run.is_main:
        if table and args.bank_per_class:
            orders = table.batches(labels, mirrored=args.mirror > 0)
            model.bank = ClassOrderBank.build(
                orders, cache.num_classes, args.bank_per_class, args.seed, source=table.source
            )
        save_model(model, args.output, recipe=args)


def counts(args: Args, run: Run, length: int) -> tuple[int, int]:
    """How many tokens are masked in this step, and how many of them are predicted."""
    if not args.predict_steps:
        masked = math.ceil(length * mask_rate(args.mask_ratio, run.uniform(), args.mask_ratio_min))
        return masked, masked
    plan = tokens_per_step(length, min(length, args.predict_steps))
    step = run.randint(0, len(plan))
    return sum(plan[step:]), plan[step]


def parameter_groups(model: MAR, weight_decay: float) -> list[dict]:
    """No decay on 1-D parameters and on the diffusion head, as published."""
    head = {id(p) for p in model.diffloss.parameters()}
    decay = [p for p in model.parameters() if p.ndim > 1 and id(p) not in head]
    no_decay = [p for p in model.parameters() if p.ndim <= 1 or id(p) in head]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def identity(record: torch.Tensor) -> torch.Tensor:
    """Records are used as they are."""
    return record


def cached_latents(args: Args, dataset, model: MAR, num_classes: int) -> LatentCache:
    """The latents of the data set; every process encodes its share of the files."""
    state = processes()
    folder = args.latents or str(Path(args.output) / "latents")
    made_up = args.dry_run and model.vae != "pixels"
    if made_up:
        note(f"latents are noise, the VAE {model.vae!r} is not loaded")
    codec = NoiseCodec(model.latent_shape, model.img_size) if made_up else model.codec()
    if (codec.channels, model.img_size // codec.stride) != (model.latent_shape[0], model.latent_shape[1]):
        raise CollapseError(
            f"vae: {model.vae!r} has {codec.channels} channels and stride {codec.stride}, which does not give the "
            f"model's latents {model.latent_shape} for {model.img_size} pixels"
        )
    source = describe_dataset(args.dataset, args.split, args.part)
    LatentCache.build(
        folder, dataset, codec, model.img_size, source, device=state.device, quiet=not state.is_main_process,
        num_classes=num_classes, rank=state.process_index, world=state.num_processes,
    )  # fmt: skip
    state.wait_for_everyone()
    return LatentCache(folder, codec)


def orders_of_dataset(args: Args, run: Run, dataset) -> OrderTable:
    """The orders of the training images on the model's grid, see `data_set_orders`."""
    orderer = CollapseOrder.named(args.orderer, args.seed).to(run.accelerator.device)
    folder = args.order_table or Path(args.output) / "orders"
    size, grid = run.bare.img_size, run.bare.grid
    described = describe_dataset(args.dataset, args.split, args.part)
    source = order_source(described, len(dataset), (size, size), grid, args.orderer, orderer)
    transform = eval_transform(size, orderer.mean, orderer.std)
    return data_set_orders(
        run, folder, source, dataset, transform, orderer, lambda images: orderer(images, grid), args.mirror > 0
    )


if __name__ == "__main__":
    run_script(main)
