"""The table of `benchmarks/real_vit.py`: its cells by name, its rows, and the curves of its plot."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

from timm_collapse.evaluation.report import markdown_table


class Cell(NamedTuple):
    """What is measured: an order, what becomes of the rest, and a budget of tokens."""

    order: str
    """A name; "random SEED"; NAME:reversed or NAME:another."""
    remainder: str
    share: float
    bias: float
    budget: int

    @property
    def key(self) -> str:
        """Its name in the JSON file; `of` is the inverse."""
        return "|".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self)

    @classmethod
    def of(cls, key: str) -> Cell:
        order, remainder, share, bias, budget = key.split("|")
        return cls(order, remainder, float(share), float(bias), int(budget))

    @staticmethod
    def is_key(key: str) -> bool:
        """Whether a key is one of a cell; "whole" and "downscaled|TOKENS" are none."""
        return key.count("|") == 4

    @classmethod
    def all_of(cls, found: Iterable[str]) -> list[Cell]:
        """The cells among keys."""
        return [cls.of(key) for key in found if cls.is_key(key)]

    @property
    def kind(self) -> str:
        """The order without its seed."""
        return self.order.split(" ")[0]

    @property
    def work(self) -> str:
        """Cells with the same one cost the same."""
        return self._replace(order=self.kind.split(":")[0], bias=float(self.bias > 0)).key

    @property
    def method(self) -> str:
        """What becomes of the rest, in words."""
        share = f" {self.share:g}" if self.remainder in ("coarse", "mixed", "split", "zoom") else ""
        return f"{self.remainder}{share}" + (f", area bias {self.bias:g}" if self.bias else "")


def report(found: dict[str, dict], question: dict, args: argparse.Namespace) -> list[str]:
    """Paragraphs and tables of markdown.

    Args:
        found: Key of a cell -> what was measured.
        question: What was asked, of the images and the model.
        args: Of the command.
    """
    errors = [measured["error"] for measured in found.values()]
    probe = f"linear probe on {args.probe} whole training images" if args.probe else "the model's own classifier"
    text = [
        f"Frozen {question['model']}{f', first {args.blocks} blocks' if args.blocks else ''}, {args.img_size} px, "
        f"{found['whole']['tokens']} patches; {probe}; {question['images']} images of {question['dataset']} "
        f"({args.split}). Top-1 in per cent (standard error up to {max(errors):.1f}; all see the same images), in "
        "brackets the root of the Kullback-Leibler divergence from its own output on the whole image, then images a "
        f"second, order included (batch {args.timed_batch}, {args.precision}, timed in turn). random: mean of "
        f"{args.seeds} seeds.",
        markdown_table([whole_row(key, found[key]) for key in found if not Cell.is_key(key)]),
        "Orders, nothing for the patches that are left out:",
        markdown_table(rows_of([cell for cell in Cell.all_of(found) if cell.remainder == "none"], found)),
    ]
    if rest := [cell for cell in Cell.all_of(found) if cell.remainder != "none"]:
        text += ["With tokens for the rest, within the budget:", markdown_table(rows_of(rest, found))]
    return text + ([args.note] if args.note else [])


def whole_row(key: str, measured: dict[str, float]) -> dict[str, str]:
    """A row of the table of whole and downscaled images."""
    name, _, tokens = key.partition("|")
    return {"image": name, "tokens": tokens or str(measured["tokens"]), "top-1": shown([measured])}


def rows_of(cells: list[Cell], found: dict[str, dict]) -> list[dict[str, str]]:
    """A row for each order and method, best first; a column for each budget."""
    budgets = sorted({cell.budget for cell in cells}, reverse=True)
    groups: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for cell in cells:
        group = groups.setdefault((cell.kind, cell.method), {budget: [] for budget in budgets})
        group[cell.budget].append(found[cell.key])

    def accuracy(group: dict[int, list[dict]]) -> float:
        return mean(mean(seed["top1"] for seed in seeds) for seeds in group.values() if seeds)

    return [
        {"order": order, "rest": method} | {f"{budget} tokens": shown(group[budget]) for budget in budgets}
        for (order, method), group in sorted(groups.items(), key=lambda item: -accuracy(item[1]))
    ]


def shown(seeds: list[dict[str, float]]) -> str:
    """Top-1, root KL and speed, means of the seeds."""
    if not seeds:
        return ""
    top1, distance = (mean(seed[name] for seed in seeds) for name in ("top1", "root_kl"))
    timed = [seed["images_per_second"] for seed in seeds if "images_per_second" in seed]
    speed = f", {mean(timed):.1f}/s" if timed else ""
    return f"{top1:.1f} ({distance:.2f}){speed}"


def curves(
    found: dict[str, dict], bias: float, orders: list[str], remainders: list[str]
) -> dict[str, list[tuple[float, ...]]]:
    """What is plotted: the downscaled image, and orders without a remainder and with some at one area bias.

    Controls, NAME:reversed and NAME:another, are left to the table.
    """
    lines: dict[str, list[tuple[float, ...]]] = {}
    for key, measured in found.items():
        point = tuple(measured[name] for name in ("tokens", "top1", "error", "images_per_second"))
        if not Cell.is_key(key):
            lines.setdefault("downscaled", []).append(point)
            continue
        cell = Cell.of(key)
        if ":" in cell.order:
            continue
        if cell.remainder == "none" and cell.order in ("random 0", *orders):
            lines.setdefault(f"{cell.kind}, none", []).append(point)
        elif f"{cell.remainder}:{cell.share:g}" in remainders and cell.bias == bias and cell.order in orders:
            lines.setdefault(f"{cell.order}, {cell.method}", []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
