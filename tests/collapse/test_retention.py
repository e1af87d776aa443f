import pytest
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.collapse import retained_count, retention_mask


@pytest.mark.parametrize("keep", [1, 0.5, 0.22, 7, 0.001])
@pytest.mark.parametrize("grid, merge", [((8, 12), 1), ((8, 12), 2), ((8, 12), 4)])
def test_every_row_has_the_count_that_was_promised(grid, merge, keep):
    if keep == 7 and merge == 4:
        with pytest.raises(CollapseError, match="keep"):
            retained_count(grid, keep, merge)
        return
    count = retained_count(grid, keep, merge)
    mask = retention_mask(torch.randn(3, 3, 32, 48), grid, keep, merge, orderer="random")
    assert mask.dtype == torch.bool and mask.shape == (3, grid[0] * grid[1] // merge**2)
    assert mask.sum(1).tolist() == [count] * 3
    assert keep == 7 or count == max(1, round(keep * mask.shape[1]))


def test_the_mask_is_of_the_first_cells_of_the_order():
    images, orderer = torch.randn(2, 3, 64, 64), CollapseOrder.from_pretrained("collapse_ranker_tiny")
    mask = retention_mask(images, (8, 8), 0.22, orderer=orderer)
    kept = orderer(images, grid=(8, 8)).keep(0.22)
    assert torch.equal(mask, torch.zeros(2, 64, dtype=torch.bool).scatter(1, kept, True))


@pytest.mark.parametrize("merge", [0, 3, 1.5, "2"])
def test_a_merge_that_does_not_divide_the_grid_is_refused(merge):
    with pytest.raises(CollapseError, match="merge must be a positive int that divides"):
        retained_count((8, 8), 0.5, merge)
