"""Train the one-pass orderer by regression on the error maps that a frozen reconstructor leaves.

accelerate launch train/reconstructor.py --dataset digits --output runs/environment
accelerate launch train/ranker.py --dataset digits --reconstructor runs/environment --output runs/ranker
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import timm

from timm_collapse import CollapseError
from timm_collapse.data import open_dataset, train_transform
from timm_collapse.engine import Run, TrainArgs, parse_args, run_script
from timm_collapse.hub import load_weights, save_model
from timm_collapse.models.lesson import Lesson


@dataclass
class Args(TrainArgs):
    """Arguments of the ranker."""

    model: str = field(default="collapse_ranker_tiny", metadata={"help": "Registered architecture."})
    model_args: str = field(default="{}", metadata={"help": "JSON of further architecture arguments."})
    init: str = field(default="", metadata={"help": "Start from the weights of this folder (another resolution, say)."})
    reconstructor: str = field(default="runs/environment", metadata={"help": "Folder of a trained reconstructor."})
    dataset: str = field(
        default="digits", metadata={"help": "digits, a parquet folder, or a timm data set; a+b joins."}
    )
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    part: str = field(default="", metadata={"help": "'i/n' or '!i/n': disjoint parts for judges and contestants."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})
    sets: int = field(default=4, metadata={"help": "Revealed sets an image, beside the visible one."})
    on_policy: float = field(default=0.4, metadata={"help": "Share of steps on the ranker's own sets, after a tenth."})


def main() -> None:
    args = parse_args(Args, __doc__)
    model = timm.create_model(args.model, **json.loads(args.model_args))
    if args.init:
        load_weights(model, args.init)
    environment = timm.create_model(f"local-dir:{args.reconstructor}", pretrained=True)
    cfg = environment.pretrained_cfg
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    transform = train_transform(environment.img_size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    h, w = environment.tokenizer.grid((environment.img_size, environment.img_size))
    if (h, w) != model.grid:
        raise CollapseError(f"reconstructor: its grid {h} x {w} must be that of the ranker, {model.grid}")
    run = Run(args, model, dataset, transform)
    lesson = Lesson(environment.to(run.accelerator.device), args.sets)
    for images, _ in run:
        own = run.progress > 0.1 and run.uniform() < args.on_policy
        with run.accelerator.autocast():
            visible, revealed, errors = lesson(images, run, run.bare if own else None)
            out = run.model(images, visible, revealed, errors)
        run.step(out["loss"], out)
    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)


if __name__ == "__main__":
    run_script(main)
