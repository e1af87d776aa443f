import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from timm_collapse.order import CollapseError, Order, check_keep, check_keeps, parse_keep, resolve_keep


@pytest.mark.parametrize("keep, patches", [
    (1, 196), (1.0, 196), (np.int64(1), 196), (np.float32(1), 196), (torch.tensor(1), 196), ("1", 196), ("1.0", 196),
    (0.22, 43), (np.float64(0.22), 43), (np.array(0.5), 98), (torch.tensor(0.5), 98), (Fraction(1, 4), 49),
    ("0.22", 43), (" .5 ", 98), ("1e-9", 1), (1e-9, 1), (2, 2), (196, 196), (np.int64(50), 50), (np.uint8(50), 50),
    (torch.tensor(50), 50), ("64", 64), (" 64 ", 64),
])  # fmt: skip
def test_a_budget_in_every_type_of_number_and_as_text(keep, patches):
    budget = parse_keep(keep) if isinstance(keep, str) else check_keep(keep)
    assert type(budget) is (int if patches > 1 and budget > 1 else float)
    assert resolve_keep(budget, 196) == patches
    if not isinstance(keep, str):
        assert resolve_keep(keep, 196) == patches


def test_halves_are_rounded_to_even():
    assert resolve_keep(0.5, 5) == 2 and resolve_keep(0.5, 7) == 4 and resolve_keep(0.5, 1) == 1


WRONG = [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, np.bool_(True), torch.tensor(True), "half", None, [0.5],
         np.float64("nan"), 64.0, torch.tensor([0.5]), 2j]  # fmt: skip


@pytest.mark.parametrize("keep", [*WRONG, 197, np.int64(197)])
def test_a_wrong_budget_is_named(keep):
    with pytest.raises(
        CollapseError, match=r"^keep must be a ratio in \(0, 1\].* count in \[2, 196\].*, got "
    ) as error:
        resolve_keep(keep, 196)
    assert type(keep).__name__ in str(error.value) or "tensor" in str(error.value)


@pytest.mark.parametrize("keep", WRONG)
def test_a_wrong_budget_is_named_where_the_number_of_patches_is_not_known(keep):
    with pytest.raises(CollapseError, match=r"^keep must be a ratio in \(0, 1\].* count of at least 2, got "):
        check_keep(keep)


@pytest.mark.parametrize("text", ["half", "", "64.0", "0", "-1", "nan", "1_0.5.", "0x10"])
def test_a_wrong_text_is_named(text):
    with pytest.raises(CollapseError, match="^keep must be "):
        parse_keep(text)


@pytest.mark.parametrize("keeps, got", [
    ([], "none"), ([0.5, 0], "0"), ([1.5], "1.5"), ([math.nan], "nan"), ([True], "True"), ([0.5, 64], "64"),
    ("0.5", "'0'"), (None, "None"),
])  # fmt: skip
def test_wrong_ratios_are_named(keeps, got):
    with pytest.raises(CollapseError, match=rf"^keeps must .*ratios? in \(0, 1\], got {got}$"):
        check_keeps(keeps)


def test_ratios_of_a_curve_are_distinct_and_descending():
    assert check_keeps([0.5, 1, np.float64(0.22), 0.5, 1.0]) == [1.0, 0.5, 0.22]
    assert check_keeps(np.array([0.1, 0.2])) == [0.2, 0.1] and check_keeps(0.5) == [0.5]


def test_the_first_patches_by_number():
    order = Order.from_indices(torch.tensor([[2, 0, 3, 1]]), (2, 2))
    assert [order.first(count).tolist() for count in range(5)] == [[[]], [[2]], [[0, 2]], [[0, 2, 3]], [[0, 1, 2, 3]]]
    assert order.keep(1).tolist() == [[0, 1, 2, 3]] and order.mask(1).all() and order.keep(0.01).tolist() == [[2]]
