"""Train a CoMAE: encoder of weights and decoder of the target patch in alternation.

accelerate launch train/comae.py --dataset digits --output runs/comae
accelerate launch train/comae.py --dataset digits --output runs/comae_paper --model_args '{"recipe": "paper"}'
"""

from __future__ import annotations

from dataclasses import dataclass, field

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.data import open_dataset, train_transform
from timm_collapse.engine import TrainArgs, create_model, parse_args, run_script, start_run
from timm_collapse.hub.save import load_weights, save_model
from timm_collapse.lessons.comae import alternate


@dataclass
class Args(TrainArgs):
    """Arguments of CoMAE."""

    model: str = field(default="comae_tiny", metadata={"help": "Registered architecture."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})
    targets: int = field(default=8, metadata={"help": "Target patches an image and step."})


def main() -> None:
    args = parse_args(Args, __doc__)
    model = create_model(args)
    if args.init:
        load_weights(model, args.init)
    cfg = model.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    transform = train_transform(model.img_size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    run = start_run(args, model, dataset, transform, find_unused=True)
    for images, _ in run:
        arguments, frozen = alternate(run.bare, images, run, args.targets)
        with run.accelerator.autocast():
            out = run.model(images, **arguments)
        # Random masks only feed the decoder: the log is of the encoder's own masks.
        run.step(out["loss"], out if arguments["mask"] is None else {"l1_random": out["l1"]}, frozen)
    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)


if __name__ == "__main__":
    run_script(main)
