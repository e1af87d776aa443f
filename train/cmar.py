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

import math
from dataclasses import dataclass, field
from pathlib import Path

from timm_collapse import ClassOrderBank, CollapseError, CollapseOrder
from timm_collapse.data import OrderedLatents, eval_transform, open_dataset
from timm_collapse.engine import (
    NoiseCodec,
    TrainArgs,
    create_model,
    data_set_latents,
    data_set_orders,
    note,
    parse_args,
    part_for,
    run_script,
    start_run,
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
    vae: str = field(default="", metadata={"help": "pixels, a Hub id, folder or file; empty: the architecture's."})
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
        self.check_range("random_orders", high=1)
        self.check_range("jitter", "bank_per_class", "predict_steps")


def main() -> None:
    args = parse_args(Args, __doc__)

    # the model
    labelled = args.model_kwargs.get("class_num") != 0
    images, num_classes = open_dataset(args.dataset, args.split, args.part, labelled)
    own = {"class_num": num_classes}
    if args.vae:
        own["vae"] = args.vae
    if args.vae and args.vae != "pixels":
        own["latent_bound"] = 0.0  # only pixels are bounded
    model: MAR = create_model(args, **own)
    if args.init:
        load_mar_weights(model, args.init)
    length, groups = model.seq_len, parameter_groups(model, args.weight_decay)

    # the samples: (latents, label) or, with a table of orders, (latents, label, ranks)
    images_in_all, images, table = len(images), part_for(args, images), None
    folder = args.latents or Path(args.output) / "latents"
    cache = data_set_latents(args, folder, images, codec_of(args, model), model.img_size, num_classes)
    if args.orderer != "random":
        orderer, size = CollapseOrder.named(args.orderer, args.seed), (model.img_size, model.img_size)
        folder = args.order_table or Path(args.output) / "orders"
        transform = eval_transform(model.img_size, orderer.mean, orderer.std)
        table = data_set_orders(
            args, folder, args.orderer, orderer, images, transform, size, model.grid, mirrored=args.mirror > 0
        )
    samples = OrderedLatents(cache, table, args.mirror)

    run = start_run(args, model, samples, images=images_in_all, param_groups=groups)
    for latents, labels, *ranks in run:
        b = len(latents)

        # the order, best first: what comes last is masked
        if table:
            order = jitter_order(Order.from_ranks(*ranks, model.grid), args.jitter, run.random.rand(b, length))
            order = mix_random(order, args.random_orders, run.random.rand(b, length + 1))
        else:
            order = Order(run.random.rand(b, length), model.grid)
        masked, predicted = counts(args, run.random, length)

        # the diffusion loss of the masked tokens: time steps, noise, and labels dropped for guidance
        shape = (model.diffusion_batch_mul, predicted)
        t = (run.random.rand(b, *shape) * NUM_TIMESTEPS).long().transpose(0, 1)
        noise = run.random.randn(b, *shape, model.token_dim).transpose(0, 1)
        drop = run.random.rand(b) < model.label_drop_prob
        with run.accelerator.autocast():
            out = run.model(latents, labels, order.indices, masked, drop, t, noise, predicted)
        run.step(out["loss"], out)

    model = run.finish()
    if run.is_main:
        if table and args.bank_per_class:
            orders = table.batches(cache.labels, mirrored=args.mirror > 0)
            model.bank = ClassOrderBank.build(
                orders, cache.num_classes, args.bank_per_class, args.seed, source=table.source
            )
        save_model(model, args.output, recipe=args)


def counts(args: Args, random, length: int) -> tuple[int, int]:
    """How many tokens are masked in this step, and how many of them are predicted."""
    if not args.predict_steps:
        masked = math.ceil(length * mask_rate(args.mask_ratio, random.uniform(), args.mask_ratio_min))
        return masked, masked
    plan = tokens_per_step(length, min(length, args.predict_steps))
    step = random.randint(0, len(plan))
    return sum(plan[step:]), plan[step]


def parameter_groups(model: MAR, weight_decay: float) -> list[dict]:
    """No decay on 1-D parameters and on the diffusion head, as published."""
    head = {id(p) for p in model.diffloss.parameters()}
    decay = [p for p in model.parameters() if p.ndim > 1 and id(p) not in head]
    no_decay = [p for p in model.parameters() if p.ndim <= 1 or id(p) in head]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def codec_of(args: Args, model: MAR):
    """What makes latents of images; in a dry run they are noise, so that no VAE is loaded.

    Raises:
        CollapseError: A VAE whose latents are not those of the model.
    """
    if args.dry_run and model.vae != "pixels":
        note(f"latents are noise, the VAE {model.vae!r} is not loaded")
        return NoiseCodec(model.latent_shape, model.img_size)
    codec = model.codec()
    if (codec.channels, model.img_size // codec.stride) != model.latent_shape[:2]:
        raise CollapseError(
            f"vae: {model.vae!r} has {codec.channels} channels and stride {codec.stride}, which does not give the "
            f"model's latents {model.latent_shape} for {model.img_size} pixels"
        )
    return codec


if __name__ == "__main__":
    run_script(main)
