"""A data set whose photos fill only a part of the picture: each is shrunk and put somewhere on a plain canvas.

    python benchmarks/inset_photos.py --dataset data/caltech101 --share 0.25 --output runs/caltech101_inset

Shrinking the picture costs such images more than those that their content fills. The folder that is written serves
`benchmarks/real_vit.py`, `benchmarks/adapt_vit.py` and `train/cvit.py` as --dataset.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from timm_collapse import CollapseError
from timm_collapse.data import open_dataset


def inset(photo: Image.Image, size: int, share: float, place: tuple[float, float]) -> Image.Image:
    """A photo on a square canvas of its mean colour.

    Args:
        photo: Any size; its longer side becomes sqrt(share) of the canvas.
        size: Of the canvas, pixels.
        share: Of the canvas that a square photo covers, in (0, 1].
        place: In [0, 1]: down and to the right, of the room that is left.
    """
    if not 0 < share <= 1:
        raise CollapseError(f"share must be in (0, 1], got {share}")
    photo = photo.convert("RGB")
    scale = size * share**0.5 / max(photo.size)
    photo = photo.resize([max(1, round(side * scale)) for side in photo.size], Image.Resampling.LANCZOS)
    colour = tuple(np.asarray(photo).reshape(-1, 3).mean(0).round().astype(int).tolist())
    canvas = Image.new("RGB", (size, size), colour)
    left, top = (round((size - side) * at) for side, at in zip(photo.size, reversed(place), strict=True))
    canvas.paste(photo, (left, top))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="with labels; see train/cvit.py")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"])
    parser.add_argument("--size", type=int, default=224, help="side of the canvas in pixels")
    parser.add_argument("--share", type=float, default=0.25, help="of the canvas that a square photo covers")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--output", required=True, help="folder: SPLIT/LABEL/NUMBER.jpg")
    args = parser.parse_args()
    for split in args.splits:
        dataset, random = open_dataset(args.dataset, split, labelled=True).dataset, np.random.default_rng(args.seed)
        for i in tqdm(range(len(dataset)), desc=split):
            photo, label = dataset[i]
            file = Path(args.output) / split / f"{label:04}" / f"{i:06}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            inset(photo, args.size, args.share, tuple(random.random(2))).save(file, quality=95)


if __name__ == "__main__":
    main()
