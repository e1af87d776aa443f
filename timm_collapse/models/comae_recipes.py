"""The choices in which CoMAEs differ: as published, and as they were measured to work at small scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..order import CollapseError

HEADS = ("linear", "offset", "attention")


@dataclass(frozen=True)
class Recipe:
    """Choices of a CoMAE; what each means is said at `CoMAE`."""

    head: str
    skip: int
    budget: float
    random_share: float
    decoder_first: float
    sigma: float
    scale: bool = False
    exclude: int = 0

    @classmethod
    def named(cls, name: str, **given) -> Recipe:
        """A recipe of RECIPES, with other values where `given` has any but None.

        Raises:
            CollapseError: No such recipe, or a value out of range.
        """
        if name not in RECIPES:
            raise CollapseError(f"recipe: must be one of {', '.join(RECIPES)}, got {name!r}")
        found = replace(RECIPES[name], **{key: value for key, value in given.items() if value is not None})
        if found.head not in HEADS:
            raise CollapseError(f"head: must be one of {', '.join(HEADS)}, got {found.head!r}")
        if found.sigma <= 0:
            raise CollapseError(f"sigma: must be positive, got {found.sigma}")
        for key in ("skip", "exclude"):
            if getattr(found, key) < 0:
                raise CollapseError(f"{key}: must be at least 0, got {getattr(found, key)}")
        return found


RECIPES = {
    "stable": Recipe("offset", skip=2, budget=0.4, random_share=0.5, decoder_first=0.3, sigma=0.35),
    "paper": Recipe("linear", skip=0, budget=0.0, random_share=0.0, decoder_first=0.0, sigma=0.5),
}
