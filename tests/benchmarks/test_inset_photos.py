"""Photos on a canvas: where they lie, what is around them, and the folder that is written."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_collapse import CollapseError
from timm_collapse.data import open_dataset

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import inset_photos  # noqa: E402


@pytest.mark.parametrize("place, corner", [((0, 0), (0, 0)), ((1, 1), (32, 32)), ((1, 0.5), (32, 16))])
def test_a_photo_covers_its_share_at_its_place(place, corner):
    pixels = np.full((100, 100, 3), (10, 20, 30), np.uint8)
    pixels[:50] = (200, 100, 0)
    canvas = np.asarray(inset_photos.inset(Image.fromarray(pixels), 64, 0.25, place)).astype(int)
    mean = np.round(np.mean([(200, 100, 0), (10, 20, 30)], 0))
    around = np.abs(canvas - mean).max(-1) <= 1
    rows, columns = np.nonzero(~around)
    assert (rows.min(), columns.min()) == corner
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (32, 32)
    assert np.abs(canvas[corner[0] + 4, corner[1] + 4] - (200, 100, 0)).max() <= 1


def test_the_longer_side_decides():
    canvas = np.asarray(inset_photos.inset(Image.new("RGB", (20, 80), (9, 9, 9)), 40, 1.0, (0, 0)))
    assert canvas.shape == (40, 40, 3) and (canvas == 9).all()


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_shares_are_checked(share):
    with pytest.raises(CollapseError, match=rf"share must be in \(0, 1\], got {share}"):
        inset_photos.inset(Image.new("RGB", (8, 8)), 16, share, (0, 0))


def test_the_folder_is_a_data_set_with_the_same_labels(tmp_path, monkeypatch):
    output = tmp_path / "inset"
    flags = ["--dataset", "digits", "--splits", "validation", "--size", "16", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["inset_photos.py", *flags])
    inset_photos.main()
    made, original = (open_dataset(name, "validation", labelled=True) for name in (str(output), "digits"))
    assert made.num_classes == original.num_classes and len(made.dataset) == len(original.dataset)
    assert sorted(made.dataset.labels.tolist()) == sorted(original.dataset.labels.tolist())
    assert made.dataset[0][0].size == (16, 16)
