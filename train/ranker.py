"""Train the one-pass orderer, without labels: which patches tell most about the image?

--target pixels: by regression on the error maps that a frozen reconstructor leaves.

    accelerate launch train/reconstructor.py --dataset digits --output runs/environment
    accelerate launch train/ranker.py --dataset digits --reconstructor runs/environment --output runs/ranker

--target imitation: by regression on all errors that a trained ranker of the same grid expects, which needs no
reconstructor; the model starts from that ranker's weights.

    accelerate launch train/ranker.py --target imitation --model collapse_ranker_nano_224 \
        --teacher collapse_ranker_tiny_224_rerun --dataset path/to/photos

--target features: by regression on how far a frozen ViT that sees only some patches is from its own output on the
whole image. Any collapsible timm ViT with the ranker's patch grid; best one that is used to dropped patches.

    accelerate launch train/cvit.py --dataset digits --orderer random --output runs/rvit
    accelerate launch train/ranker.py --target features --dataset digits --teacher local-dir:runs/rvit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from timm_collapse import CollapseError, Ranker, collapse
from timm_collapse.data import Images, open_dataset, train_transform
from timm_collapse.engine import Run, TrainArgs, check_model_name, create_model, parse_args, run_script, start_run
from timm_collapse.hub.save import load_weights, save_model
from timm_collapse.lessons.features import FeatureLesson
from timm_collapse.lessons.imitation import Imitation, inherit
from timm_collapse.lessons.pixels import Lesson
from timm_collapse.models.normalisation import Normalisation
from timm_collapse.models.registry import load_model


@dataclass
class Args(TrainArgs):
    """Arguments of the ranker."""

    model: str = field(default="collapse_ranker_tiny", metadata={"help": "Registered architecture."})
    target: str = field(
        default="pixels",
        metadata={"help": "pixels (a reconstructor's errors), imitation (a ranker's) or features (a ViT's)."},
    )
    teacher: str = field(
        default="",
        metadata={"help": "For imitation and features: any timm model name, hf-hub: and local-dir: included."},
    )
    teacher_remainder: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "For features: none, fused, coarse, split; one is drawn each step."},
    )
    teacher_area_bias: float = field(default=0.0, metadata={"help": "For features: that of the collapsed ViT."})
    reconstructor: str = field(default="runs/environment", metadata={"help": "Folder of a trained reconstructor."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})
    sets: int = field(default=4, metadata={"help": "Revealed sets an image, beside the visible one."})
    on_policy: float = field(default=0.4, metadata={"help": "Share of steps on the ranker's own sets, after a tenth."})

    def __post_init__(self):
        super().__post_init__()
        if self.teacher:
            check_model_name("teacher", self.teacher)
        if self.target not in TRAINERS:
            raise CollapseError(f"target: must be one of {', '.join(TRAINERS)}, got {self.target!r}")
        if self.target != "pixels" and not self.teacher:
            raise CollapseError(f"teacher: --target {self.target} needs a timm model's name, got none")
        self.check_range("crop_scale", "on_policy", high=1)
        self.check_range("sets", low=1)
        self.check_range("teacher_area_bias")


def main() -> None:
    args = parse_args(Args, __doc__)
    model = create_model(args)
    if args.init:
        load_weights(model, args.init)
    TRAINERS[args.target](args, model)


def train_on_pixels(args: Args, model: Ranker) -> None:
    if not (Path(args.reconstructor) / "config.json").is_file():
        raise CollapseError(
            f"reconstructor: {args.reconstructor!r} holds no saved model; train/reconstructor.py --output "
            f"{args.reconstructor} makes one"
        )
    environment = load_model(args.reconstructor, "reconstructor")
    cfg = environment.pretrained_cfg
    check_grid(model, environment.tokenizer.grid((environment.img_size, environment.img_size)), "reconstructor")
    run = start_run(args, model, *open_images(args, environment.img_size, cfg), methods=METHODS)
    lesson = Lesson(environment.to(run.accelerator.device), args.sets)
    for images, _ in run:
        own = run.progress > 0.1 and run.random.uniform() < args.on_policy
        with run.accelerator.autocast():
            visible, revealed, errors = lesson(images, run.random, run.bare if own else None)
            out = run.model(images, visible, revealed, errors)
        run.step(out["loss"], out)
    finish(args, run)


def train_on_ranker(args: Args, model: Ranker) -> None:
    teacher = load_model(args.teacher, "teacher", pretrained=not args.dry_run)
    check_grid(model, teacher.grid, "teacher")
    dataset, transform = open_images(args, max(model.img_size, teacher.img_size), teacher.pretrained_cfg)
    if not args.init:
        inherit(model, teacher, torch.stack([transform(dataset[i * len(dataset) // 64][0]) for i in range(64)]))
    run = start_run(args, model, dataset, transform, methods=METHODS)
    lesson = Imitation(teacher.to(run.accelerator.device))
    for images, _ in run:
        own = run.progress > 0.1 and run.random.uniform() < args.on_policy
        with run.accelerator.autocast():
            out = run.model(images, *lesson(images, run.random, run.bare, own))
        run.step(out["loss"], out)
    finish(args, run)


def train_on_features(args: Args, model: Ranker) -> None:
    teacher = load_model(args.teacher, "teacher", pretrained=not args.dry_run)
    cfg = teacher.pretrained_cfg
    collapse(teacher, "random", remainder="none", area_bias=args.teacher_area_bias)  # only given orders are used
    size = teacher.patch_embed.img_size
    check_grid(model, teacher.patch_embed.grid_size, "teacher")
    run = start_run(args, model, *open_images(args, size[0], cfg), methods=METHODS)
    lesson = FeatureLesson(teacher.to(run.accelerator.device), args.sets, args.teacher_remainder)
    normalisation, own_normalisation = Normalisation.of(cfg), Normalisation.of(model.pretrained_cfg)
    for images, _ in run:
        own = run.progress > 0.05 and run.random.uniform() < args.on_policy
        own_images = normalisation.to(own_normalisation, images)
        with run.accelerator.autocast():
            visible, revealed, errors = lesson(images, run.random, run.bare if own else None, own_images)
            out = run.model(own_images, visible, revealed, errors)
        run.step(out["loss"], out)
    finish(args, run)


def check_grid(model: Ranker, grid: tuple[int, int], name: str) -> None:
    if tuple(grid) != model.grid:
        raise CollapseError(f"{name}: its grid {grid[0]} x {grid[1]} must be that of the ranker, {model.grid}")


def open_images(args: Args, size: int, cfg: dict) -> tuple[Images, Callable]:
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    return dataset, train_transform(size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))


def finish(args: Args, run: Run) -> None:
    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)


METHODS = ("rank", "static", "picks")
TRAINERS = {"pixels": train_on_pixels, "imitation": train_on_ranker, "features": train_on_features}

if __name__ == "__main__":
    run_script(main)
