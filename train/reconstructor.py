"""Train a masked reconstructor: the judge of orders, or the environment in which the ranker learns.

accelerate launch train/reconstructor.py --dataset digits --output runs/judge
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import timm

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.data import open_dataset, train_transform
from timm_collapse.engine import Run, TrainArgs, parse_args, run_script
from timm_collapse.hub.save import load_weights, save_model


@dataclass
class Args(TrainArgs):
    """Arguments of the masked reconstructor."""

    model: str = field(default="collapse_reconstructor_tiny", metadata={"help": "Registered architecture."})
    model_args: str = field(default="{}", metadata={"help": "JSON of further architecture arguments."})
    init: str = field(default="", metadata={"help": "Start from the weights of this folder (another resolution, say)."})
    dataset: str = field(
        default="digits", metadata={"help": "digits, a parquet folder, or a timm data set; a+b joins."}
    )
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    part: str = field(default="", metadata={"help": "'i/n' or '!i/n': disjoint parts for judges and contestants."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})


def main() -> None:
    args = parse_args(Args, __doc__)
    model = timm.create_model(args.model, **json.loads(args.model_args))
    if args.init:
        load_weights(model, args.init)
    cfg = model.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    transform = train_transform(model.img_size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    run = Run(args, model, dataset, transform)
    h, w = model.tokenizer.grid((model.img_size, model.img_size))
    for images, _ in run:
        with run.accelerator.autocast():
            out = run.model(images, run.rand(len(images), h * w), run.randint(0, h * w))
        run.step(out["loss"], out)
    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)


if __name__ == "__main__":
    run_script(main)
