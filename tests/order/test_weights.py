import pytest
import torch

from timm_collapse import CollapseError
from timm_collapse.order import patch_weights


def test_a_map_counts_by_its_mean_on_each_patch():
    maps = torch.rand(2, 8, 12)
    found = patch_weights(maps, 2, (2, 3))
    means = maps.reshape(2, 2, 4, 3, 4).mean((2, 4)).flatten(1)
    assert torch.allclose(found, means / maps.amax((1, 2)).unsqueeze(1))
    assert torch.equal(patch_weights(means, 2, (2, 3)), means / means.amax(1, keepdim=True))
    assert torch.equal(patch_weights(means.double() * 1e300, 2, (2, 3)).double().argsort(1), means.argsort(1))


def test_a_mask_and_other_grids():
    mask = torch.tensor([[True, False, True, True]])
    assert patch_weights(mask, 1, (2, 2)).tolist() == [[1, 0, 1, 1]]
    assert patch_weights(mask, 1, (2, 2), own=(1, 2)).tolist() == [[1, 0.5]]  # coarser: the mean
    assert patch_weights(mask, 1, (2, 2), own=(2, 4)).tolist() == [[1, 1, 0, 0, 1, 1, 1, 1]]  # finer: repeated
    assert patch_weights(7 * torch.ones(3, 4, dtype=torch.long), 3, (2, 2), (4, 6)).eq(1).all()


@pytest.mark.parametrize(
    "weights, message",
    [
        (
            torch.ones(2, 5),
            r"weights must be of shape \(2, 4\), for the patches of \(2, 2\), or a map \(2, H, W\)",
        ),
        (torch.ones(1, 4), "got a float32 tensor of shape"),
        (torch.ones(4), "weights must be of shape"),
        (torch.ones(2, 0, 3), "weights must be of shape"),
        ([[1, 1, 1, 1]] * 2, "got list"),
        (torch.ones(2, 4, dtype=torch.complex64), "got a complex64"),
        (torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, 1]]), r"non-negative and finite, got values in \[-1, 1\]"),
        (torch.tensor([[1.0, 1, 1, 1], [1, 1, torch.nan, 1]]), "non-negative and finite, got values in .nan, nan"),
        (torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]), "must not be all zero, got only zeros for the image at index 1"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(CollapseError, match=message):
        patch_weights(weights, 2, (2, 2))
