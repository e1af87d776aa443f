"""Train a masked reconstructor: the judge of orders, or the environment in which the ranker learns.

accelerate launch train/reconstructor.py --dataset digits --output runs/judge
"""

from __future__ import annotations

from dataclasses import dataclass, field

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.data import open_dataset, train_transform
from timm_collapse.engine import TrainArgs, create_model, parse_args, run_script, start_run
from timm_collapse.hub.save import load_weights, save_model


@dataclass
class Args(TrainArgs):
    """Arguments of the masked reconstructor."""

    model: str = field(default="collapse_reconstructor_tiny", metadata={"help": "Registered architecture."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})


def main() -> None:
    args = parse_args(Args, __doc__)
    model = create_model(args)
    if args.init:
        load_weights(model, args.init)
    cfg = model.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    transform = train_transform(model.img_size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    run = start_run(args, model, dataset, transform)
    h, w = model.tokenizer.grid((model.img_size, model.img_size))
    for images, _ in run:
        with run.accelerator.autocast():
            out = run.model(images, run.random.rand(len(images), h * w), run.random.randint(0, h * w))
        run.step(out["loss"], out)
    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)


if __name__ == "__main__":
    run_script(main)
