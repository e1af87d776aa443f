"""The command line: `timm-collapse COMMAND`, or `python -m timm_collapse COMMAND`.

Every command is a module of this folder with SUMMARY, DESCRIPTION, EXAMPLE, `declare(parser)` and `run(args)`. What is
heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from . import (
    evaluate,
    evaluate_generation,
    generate,
    latents,
    order,
    order_bank,
    order_dataset,
    publish,
    quickstart,
)

COMMANDS = {
    "quickstart": quickstart,
    "order": order,
    "evaluate": evaluate,
    "generate": generate,
    "evaluate-generation": evaluate_generation,
    "order-dataset": order_dataset,
    "order-bank": order_bank,
    "latents": latents,
    "publish": publish,
}


class Parser(argparse.ArgumentParser):
    """A parser that takes --a_b, as the train scripts write it, for --a-b."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = list(sys.argv[1:] if args is None else args)
        options = args.index("--") if "--" in args else len(args)
        return super().parse_known_args([*map(_with_dashes, args[:options]), *args[options:]], namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen command's module is in `args.command`."""
    from .. import __version__

    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="timm-collapse",
        description="Patch collapse: which patches of an image explain the others.",
        epilog="example:\n  " + order.EXAMPLE,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"timm-collapse {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=textwrap.fill(command.DESCRIPTION, 80),  # the style wraps nothing, for the example's sake
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=style,
        )
        command.declare(subparser)
        subparser.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for an error that one line on stderr explains, 130 after Ctrl-C.

    Raises:
        SystemExit: From argparse: 0 after --help and --version, 2 for arguments that it cannot parse.
    """
    args = build_parser().parse_args(argv)
    from ..order import CollapseError

    try:
        args.command.run(args)
    except (CollapseError, OSError) as error:
        print(f"timm-collapse: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _with_dashes(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument
