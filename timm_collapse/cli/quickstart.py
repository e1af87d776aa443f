"""`timm-collapse quickstart`: the first minutes.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse

from .common import add_seed

SUMMARY = "what orders are worth, on two photos, then training in miniature; offline"
DESCRIPTION = (
    "Orders two photos with bundled weights, measures how much the orders leave unknown and how much faster a vision "
    "transformer gets; then trains a CoMAE and a ranker in miniature and measures theirs. Saves models and pictures. "
    "Needs no network and no GPU, and takes less than three minutes on two cores."
)
EXAMPLE = "timm-collapse quickstart --output runs/quickstart"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `quickstart`."""
    parser.add_argument(
        "--output", default="runs/quickstart", metavar="FOLDER", help="for models and pictures (default: %(default)s)"
    )
    add_seed(parser, "the crops and all trainings")


def run(args: argparse.Namespace) -> None:
    """Measures bundled orders, and trains in miniature."""
    from ..quickstart import quickstart

    quickstart(args.output, args.seed)
