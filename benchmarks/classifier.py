"""Train a plain timm classifier: the judge of generated images (`evaluate-generation --features local-dir:FOLDER`).

accelerate launch benchmarks/classifier.py --dataset path/to/cifar10 --output runs/judge
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from timm_collapse.data import eval_transform, open_dataset, train_transform
from timm_collapse.engine import TrainArgs, parse_args, run_script, start_run
from timm_collapse.evaluation import image_batches
from timm_collapse.hub.save import save_model


@dataclass
class Args(TrainArgs):
    """Arguments of the classifier."""

    model: str = field(default="regnetx_002", metadata={"help": "Any timm classifier."})
    img_size: int = field(default=64, metadata={"help": "Images are resized to this side in pixels."})
    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing."})


def main() -> None:
    args = parse_args(Args, __doc__)
    dataset, num_classes = open_dataset(args.dataset, args.split, args.part)
    mean, std, size = (0.5,) * 3, (0.25,) * 3, args.img_size
    shape = {"input_size": (3, size, size), "test_input_size": None, "mean": mean, "std": std, "crop_pct": 1.0}
    model = timm.create_model(args.model, num_classes=num_classes, pretrained_cfg_overlay=shape,
                              **args.model_kwargs).to(memory_format=torch.channels_last)  # fmt: skip
    model.pretrained_cfg["tag"] = Path(args.dataset).name  # not the weights of the architecture's first tag
    run = start_run(args, model, dataset, train_transform(size, mean, std, scale=(0.6, 1.0)))
    for images, labels in run:
        with run.accelerator.autocast():
            logits = run.model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
        run.step(loss, {"loss": loss, "top1": (logits.argmax(1) == labels).float().mean()})
    model = run.finish()
    if run.is_main:
        top1 = validation_top1(model, args, eval_transform(size, mean, std))
        print(f"top-1 {top1:.1f}%")
        save_model(model.to(memory_format=torch.contiguous_format), args.output, recipe=args, validation_top1=top1)


@torch.no_grad()
def validation_top1(model, args: Args, transform) -> float:
    """Percent of the validation images, on one process."""
    right = total = 0
    for images, labels in image_batches(open_dataset(args.dataset, "validation").dataset, transform):
        right += (model(images.to(next(model.parameters()).device)).argmax(1).cpu() == labels).sum().item()
        total += len(labels)
    return 100 * right / total


if __name__ == "__main__":
    run_script(main)
