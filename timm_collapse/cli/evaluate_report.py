"""What `timm-collapse evaluate` found, as one dict, as markdown and as tables in the terminal."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation import AccuracyCurve, Cost
from ..evaluation.report import hardware, markdown_table, relative_paths


def results(
    args: argparse.Namespace,
    entries: list,
    curves: dict[str, AccuracyCurve],
    costs: dict[str, list[Cost]],
    images: int,
    device: torch.device,
) -> dict[str, Any]:
    """All numbers, JSON-serialisable: what was evaluated, on what, and a list of curves with their costs.

    Args:
        args: The command's.
        entries: One for each curve, with label, model, orderer and remainder.
        curves, costs: By label; no costs where no speed was measured.
        images: Number of evaluated images.
        device: Where it ran.
    """
    rows = []
    for entry in entries:
        row = {"model": entry.model, "orderer": entry.orderer, "remainder": entry.remainder}
        row |= curves[entry.label].to_dict()
        if entry.label in costs:
            row["macs"] = [cost.macs for cost in costs[entry.label]]
            row["images_per_second"] = [cost.images_per_second for cost in costs[entry.label]]
        rows.append(row)
    return {
        "dataset": relative_paths(args.dataset), "split": args.split, "images": images, "precision": args.precision,
        "pretrained": args.pretrained, "seed": args.seed, "speed_batch": args.speed_batch, "runs": args.runs,
        "device": device.type, "hardware": hardware(), "torch": torch.__version__, "curves": rows,
    }  # fmt: skip


def summary_rows(data: dict[str, Any], columns: list[float]) -> list[dict[str, str]]:
    """One row a curve: top-1 with its standard error at each of some keeps, AuC and knee."""
    rows = []
    for curve in data["curves"]:
        row = _names(curve)
        for keep in columns:
            at = curve["keeps"].index(keep) if keep in curve["keeps"] else None
            row[_per_cent(keep)] = "" if at is None else f"{curve['top1'][at]:.2f} ±{curve['top1_error'][at]:.2f}"
        row["AuC"] = "" if curve["auc"] is None else f"{curve['auc']:.2f}"
        row["knee"] = "" if curve["knee"] is None else _per_cent(curve["knee"])
        rows.append(row)
    return rows


def cost_rows(data: dict[str, Any], columns: list[float]) -> list[dict[str, str]]:
    """One row a curve: images a second, and GMACs an image, at each of some keeps; none where nothing was timed."""
    rows = []
    for curve in data["curves"]:
        if "macs" not in curve:
            continue
        row = _names(curve)
        for keep in columns:
            at = curve["keeps"].index(keep) if keep in curve["keeps"] else None
            speed = "" if at is None else f"{curve['images_per_second'][at]:.1f} ({curve['macs'][at] / 1e9:.3g})"
            row[_per_cent(keep)] = speed
        rows.append(row)
    return rows


def all_rows(data: dict[str, Any]) -> list[dict[str, str]]:
    """One row a curve and keep, with everything that was measured."""
    timed = any("macs" in curve for curve in data["curves"])
    rows = []
    for curve in data["curves"]:
        for i, keep in enumerate(curve["keeps"]):
            row = {**_names(curve), "visible": _per_cent(keep)}
            for k in (1, 5):
                row[f"top-{k} (%)"] = f"{curve[f'top{k}'][i]:.2f} ±{curve[f'top{k}_error'][i]:.2f}"
            if timed:
                row["GMACs"] = f"{curve['macs'][i] / 1e9:.3f}"
                row["images/s"] = f"{curve['images_per_second'][i]:.1f}"
            rows.append(row)
    return rows


def caption(data: dict[str, Any]) -> str:
    """What the tables hold, in words."""
    areas = [curve["masked"] for curve in data["curves"] if curve["auc"] is not None]
    text = (
        f"Top-1 accuracy (%) ± standard error at each share of visible patches, {data['images']} images of "
        f"{data['dataset']} ({data['split']}), {'fp32' if data['precision'] == 'no' else 'bf16 autocast'}"
        f"{'' if data['pretrained'] else ', random weights'}."
    )
    if areas:
        first, last = areas[0]
        text += f" AuC: mean top-1 over {first:.0%} to {last:.0%} masked"
        text += "; knee: visible share after which accuracy falls off (Kneedle)."
    return text


def markdown(data: dict[str, Any], columns: list[float]) -> str:
    """The summary, and the table of everything."""
    return (
        f"{caption(data)}\n\n{markdown_table(summary_rows(data, columns))}\n\n{_cost_caption(data)}\n\n"
        f"{markdown_table(all_rows(data))}\n"
    )


def print_tables(console: Console, data: dict[str, Any], columns: list[float], picture: str) -> None:
    """The summary, the speeds and where the picture is, in the terminal."""
    for text, rows in ((caption(data), summary_rows(data, columns)), (_cost_caption(data), cost_rows(data, columns))):
        if not rows:
            continue
        table = Table(caption=escape(text), caption_justify="left")
        for name in rows[0]:
            table.add_column(name, overflow="fold", justify="left" if name in ("model", "orderer") else "right")
        for row in rows:
            table.add_row(*(escape(value) for value in row.values()))
        console.print(table)
    console.print(f"picture: {escape(picture)}", soft_wrap=True)


def _cost_caption(data: dict[str, Any]) -> str:
    if not data["speed_batch"]:
        return "All keeps."
    return (
        f"Images per second (GMACs an image), order included, pre-processing excluded: batch {data['speed_batch']}, "
        f"median of {data['runs']} runs in turn, {data['device']}, {data['hardware']}."
    )


def _names(curve: dict[str, Any]) -> dict[str, str]:
    remainder = f" + {curve['remainder']}" if curve["remainder"] not in ("none", "") else ""
    return {"model": curve["model"], "orderer": curve["orderer"] + remainder}


def _per_cent(share: float) -> str:
    return f"{100 * share:.4g}%"
