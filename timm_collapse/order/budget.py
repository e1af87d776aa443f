"""Token budgets: what `keep` means, everywhere in the package."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

from .errors import CollapseError, describe


def check_keep(keep: float | int, num_patches: int | None = None) -> float | int:
    """Checks a token budget.

    Args:
        keep: A ratio in (0, 1] of the patches, or an int count of at least 2 patches; the number 1 means all of them,
            whatever its type. Numbers of numpy and tensors without dimensions count as what they hold.
        num_patches: Patches N of an image, where they are known: a count may be at most N.

    Returns:
        A ratio as a float, or a count as an int.

    Raises:
        CollapseError: For a bool, NaN, another type, or a number out of range.
    """
    number = keep.item() if getattr(keep, "ndim", None) == 0 else keep
    if isinstance(number, Real) and not isinstance(number, bool):
        if 0 < number <= 1:
            return float(number)
        if isinstance(number, Integral) and 2 <= number and (num_patches is None or number <= num_patches):
            return int(number)
    counts = "of at least 2" if num_patches is None else f"in [2, {num_patches}], the patches of an image"
    raise CollapseError(
        f"keep must be a ratio in (0, 1] (1 keeps all patches) or an int count {counts}, got {describe(keep)}"
    )


def resolve_keep(keep: float | int, num_patches: int) -> int:
    """The number of patches that a token budget stands for.

    Args:
        keep: A ratio in (0, 1], or an int count in [2, num_patches]; 1 means all, see `check_keep`.
        num_patches: The number of patches N of an image, at least 1.

    Returns:
        k in [1, N]; for a ratio max(1, round(ratio * N)) with Python's round, which takes halves to the even number.

    Raises:
        CollapseError: As `check_keep`.
    """
    keep = check_keep(keep, num_patches)
    return max(1, round(keep * num_patches)) if isinstance(keep, float) else keep


def parse_keep(text: str) -> float | int:
    """A token budget as it is written: "64" is a count, "0.22" a ratio, and "1" means all, as in Python.

    Raises:
        CollapseError: For what is no number, and as `check_keep`.
    """
    try:
        number = int(text) if text.strip().lstrip("+-").isdecimal() else float(text)
    except ValueError as error:
        raise CollapseError(
            f"keep must be a number, a ratio in (0, 1] or a count of at least 2, got {text!r}"
        ) from error
    return check_keep(number)


def check_keeps(keeps: Iterable[float]) -> list[float]:
    """Distinct keep ratios, descending, for curves over models whose numbers of patches differ; a number counts as one.

    Raises:
        CollapseError: For none, a count, or what `check_keep` refuses.
    """
    ratios = []
    for keep in keeps if isinstance(keeps, Iterable) else [keeps]:
        try:
            ratios.append(check_keep(keep))
        except CollapseError:
            ratios.append(None)
        if not isinstance(ratios[-1], float):
            raise CollapseError(f"keeps must be ratios in (0, 1], got {keep!r}")
    if not ratios:
        raise CollapseError("keeps must hold at least one ratio in (0, 1], got none")
    return sorted(set(ratios), reverse=True)
