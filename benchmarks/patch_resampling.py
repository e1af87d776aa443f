"""What a ViT still knows, without training, when its patch embedding is resampled to another patch size.

    python benchmarks/patch_resampling.py --name tin100 --model runs/base --dataset data/tiny-imagenet-100

Compared are interpolated kernels, and kernels that give resized patches the old tokens as nearly as they can, by the
pseudo-inverse of the resize (Beyer et al., "FlexiViT", CVPR 2023), which is what timm does where it loads weights.
Either the image stays and has more or fewer patches, or it is resized with them, so that the function could stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import image_batches
from timm_collapse.evaluation.report import markdown_table, write_section


def interpolated(weight: Tensor, size: int, by_area: bool) -> Tensor:
    """The kernel as an image; by area: scaled so that flat patches keep their tokens."""
    kernel = F.interpolate(weight, (size, size), mode="bicubic", align_corners=False)
    return kernel * (weight.shape[-1] / size) ** 2 if by_area else kernel


METHODS = {
    "kernel, bicubic": lambda w, p: interpolated(w, p, by_area=False),
    "kernel, bicubic, scaled by area": lambda w, p: interpolated(w, p, by_area=True),
    "pseudo-inverse, bicubic": lambda w, p: resample_patch_embed(w, [p, p], "bicubic", antialias=False),
    "pseudo-inverse, bilinear, antialiased": lambda w, p: resample_patch_embed(w, [p, p], "bilinear", antialias=True),
    "pseudo-inverse, bicubic, antialiased (timm's, ours)": lambda w, p: resample_patch_embed(w, [p, p]),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--model", required=True, help="folder of a trained cvit_*")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=500, help="evenly spaced images of the split; 0: all")
    parser.add_argument("--patch-sizes", nargs="+", type=int, default=[16, 4, 2])
    parser.add_argument("--batch-size", type=int, default=50)
    return parser.parse_args()


def resampled(plain, method, patch_size: int, img_size: int):
    """The model at another patch and image size."""
    state, side = plain.state_dict(), img_size // patch_size
    state["patch_embed.proj.weight"] = method(state["patch_embed.proj.weight"], patch_size)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (side, side))
    shape = {"patch_size": patch_size, "img_size": img_size, "num_classes": plain.num_classes}
    model = timm.create_model(plain.pretrained_cfg["architecture"], keep=1.0, **shape)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def main() -> None:
    args = parse()
    plain = timm.create_model(f"local-dir:{args.model}", pretrained=True, keep=1.0).eval()
    cfg = resolve_model_data_config(plain)
    size, own = cfg["input_size"][-1], plain.patch_embed.patch_size[0]
    transform = eval_transform(size, cfg["mean"], cfg["std"])
    dataset = open_dataset(args.dataset, args.split).dataset
    batches = list(image_batches(dataset, transform, args.images, args.batch_size))
    count = sum(len(labels) for _, labels in batches)
    wanted = [plain(images).log_softmax(-1) for images, _ in batches]
    top1 = sum(int((w.argmax(1) == labels).sum()) for w, (_, labels) in zip(wanted, batches)) / count
    rows, numbers = [], {"plain": top1}
    for patch in args.patch_sizes:
        for img_size in (size, size * patch // own):
            for name, method in METHODS.items():
                model, hits, divergence = resampled(plain, method, patch, img_size), 0, 0.0
                for (images, labels), target in zip(batches, wanted):
                    if img_size != size:
                        images = F.interpolate(images, (img_size,) * 2, mode="bilinear", antialias=True)
                    found = model(images).log_softmax(-1)
                    hits += int((found.argmax(1) == labels).sum())
                    divergence += float(F.kl_div(found, target, log_target=True, reduction="sum"))
                grid = f"{img_size // patch} x {img_size // patch}"
                numbers[f"{patch} {img_size} {name}"] = {"top1": hits / count, "divergence": divergence / count}
                rows.append(
                    {"patch, px": patch, "image, px": img_size, "patches": grid, "patch embedding": name,
                     "top-1": f"{hits / count:.1%}", "divergence": f"{divergence / count:.3f}"}
                )  # fmt: skip
                print(rows[-1], flush=True)
    text = [
        f"{Path(args.model).name}, patches of {own} px, {count} validation images of {Path(args.dataset).name}, "
        f"no training: top-1 was {top1:.1%} (standard error {(top1 * (1 - top1) / count) ** 0.5:.1%}), and the mean "
        "Kullback-Leibler divergence of the new class probabilities from the old ones is what the change costs. "
        "Position embeddings are resampled alike.",
        markdown_table(rows),
    ]
    write_section(f"resampling_{args.name}", f"Resampled patch embeddings: {args.name}", "\n\n".join(text), numbers)


if __name__ == "__main__":
    main()
