"""`timm-collapse quickstart`: the whole way in miniature.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse

from .common import add_seed

SUMMARY = "train, order and measure in miniature, offline"
DESCRIPTION = (
    "Trains a small CoMAE and a ranker on scikit-learn's digits, measures how much their orders leave unknown, and "
    "saves models and pictures. Needs no network and no GPU, and takes a few minutes."
)
EXAMPLE = "timm-collapse quickstart --output runs/quickstart"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `quickstart`."""
    parser.add_argument(
        "--output", default="runs/quickstart", metavar="FOLDER", help="for models and pictures (default: %(default)s)"
    )
    add_seed(parser, "all trainings")


def run(args: argparse.Namespace) -> None:
    """Runs the whole way in miniature."""
    from ..quickstart import quickstart

    quickstart(args.output, args.seed)
