"""Train the one-pass orderer, without labels: which patches tell most about the image?

--target pixels: by regression on the error maps that a frozen reconstructor leaves.

    accelerate launch train/reconstructor.py --dataset digits --output runs/environment
    accelerate launch train/ranker.py --dataset digits --reconstructor runs/environment --output runs/ranker

--target features: by regression on how far a frozen ViT that sees only some patches is from its own output on the
whole image. Any collapsible timm ViT with the ranker's patch grid; best one that is used to dropped patches.

    accelerate launch train/cvit.py --dataset digits --orderer random --output runs/rvit
    accelerate launch train/ranker.py --target features --dataset digits --teacher local-dir:runs/rvit
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import timm

from timm_collapse import CollapseError, Ranker, collapse
from timm_collapse.data import open_dataset, train_transform
from timm_collapse.engine import Run, TrainArgs, check_model_name, create_model, parse_args, run_script, start_run
from timm_collapse.hub.save import load_weights, save_model
from timm_collapse.lessons.features import FeatureLesson
from timm_collapse.lessons.pixels import Lesson
from timm_collapse.models.normalisation import Normalisation


@dataclass
class Args(TrainArgs):
    """Arguments of the ranker."""

    model: str = field(default="collapse_ranker_tiny", metadata={"help": "Registered architecture."})
    target: str = field(default="pixels", metadata={"help": "pixels (a reconstructor's errors) or features (a ViT's)."})
    teacher: str = field(
        default="", metadata={"help": "For features: any timm model name, hf-hub: and local-dir: included."}
    )
    teacher_remainder: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "For features: none, fused, coarse; one is drawn each step."},
    )
    reconstructor: str = field(default="runs/environment", metadata={"help": "Folder of a trained reconstructor."})
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest area share of the random crops."})
    sets: int = field(default=4, metadata={"help": "Revealed sets an image, beside the visible one."})
    on_policy: float = field(default=0.4, metadata={"help": "Share of steps on the ranker's own sets, after a tenth."})

    def __post_init__(self):
        super().__post_init__()
        if self.teacher:
            check_model_name("teacher", self.teacher)
        if self.target not in ("pixels", "features"):
            raise CollapseError(f"target: must be pixels or features, got {self.target!r}")
        if self.target == "features" and not self.teacher:
            raise CollapseError("teacher: --target features needs a timm model's name, got none")


def main() -> None:
    args = parse_args(Args, __doc__)
    model = create_model(args)
    if args.init:
        load_weights(model, args.init)
    (train_on_pixels if args.target == "pixels" else train_on_features)(args, model)


def train_on_pixels(args: Args, model: Ranker) -> None:
    if not (Path(args.reconstructor) / "config.json").is_file():
        raise CollapseError(
            f"reconstructor: {args.reconstructor!r} holds no saved model; train/reconstructor.py --output "
            f"{args.reconstructor} makes one"
        )
    environment = timm.create_model(f"local-dir:{args.reconstructor}", pretrained=True)
    cfg = environment.pretrained_cfg
    check_grid(model, environment.tokenizer.grid((environment.img_size, environment.img_size)), "reconstructor")
    run = start(args, model, environment.img_size, cfg)
    lesson = Lesson(environment.to(run.accelerator.device), args.sets)
    for images, _ in run:
        own = run.progress > 0.1 and run.random.uniform() < args.on_policy
        with run.accelerator.autocast():
            visible, revealed, errors = lesson(images, run.random, run.bare if own else None)
            out = run.model(images, visible, revealed, errors)
        run.step(out["loss"], out)
    finish(args, run)


def train_on_features(args: Args, model: Ranker) -> None:
    teacher = timm.create_model(args.teacher, pretrained=not args.dry_run)
    cfg = teacher.pretrained_cfg
    collapse(teacher, "random")  # only given orders are used
    size = teacher.patch_embed.img_size
    check_grid(model, teacher.patch_embed.grid_size, "teacher")
    run = start(args, model, size[0], cfg)
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


def start(args: Args, model: Ranker, size: int, cfg: dict) -> Run:
    dataset = open_dataset(args.dataset, args.split, args.part).dataset
    transform = train_transform(size, cfg["mean"], cfg["std"], scale=(args.crop_scale, 1.0))
    return start_run(args, model, dataset, transform, methods=("rank", "static", "factors"))


def finish(args: Args, run: Run) -> None:
    model = run.finish()
    if run.is_main:
        save_model(model, args.output, recipe=args)


if __name__ == "__main__":
    run_script(main)
