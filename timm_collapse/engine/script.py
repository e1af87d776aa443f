"""How a train script reads its arguments, starts its run and reports what went wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

import torch
import yaml
from torch import nn
from transformers import HfArgumentParser

from ..models.registry import load_model
from ..order import CollapseError
from . import dry_run
from .args import TrainArgs
from .run import Run

Args = TypeVar("Args", bound=TrainArgs)


class ScriptParser(HfArgumentParser):
    """transformers' parser of a dataclass, in whose `--a_b` and `--a-b` are the same; an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_args(cls: type[Args], description: str, argv: Sequence[str] | None = None) -> Args:
    """Command line to a dataclass; `--config FILE` (YAML or JSON) sets what the command line does not.

    Also seeds torch, so that the model that is built next starts from the seed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ScriptParser(cls, description=description)
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file; the command line overrides it")
    file = parser.parse_known_args(argv)[0].config
    try:
        given = [] if file is None else _config_arguments(cls, Path(file))
        args, *_, unknown = parser.parse_args_into_dataclasses(
            [*given, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except CollapseError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.dry_run:
        dry_run.prepare_arguments(args)
    torch.manual_seed(args.seed)
    return args


def _config_arguments(cls: type[TrainArgs], path: Path) -> list[str]:
    """The entries of a file as a command line, so that they are read and checked as such."""
    if not path.is_file():
        raise CollapseError(f"config: needs an existing .json or .yaml file, got {path}")
    try:
        entries = yaml.safe_load(path.read_text())  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CollapseError(f"config: {path} is no YAML or JSON: {' '.join(str(error).split())}") from error
    entries = {} if entries is None else entries  # an empty file
    if not isinstance(entries, dict):
        raise CollapseError(f"config: {path} must have lines 'name: value', got a {type(entries).__name__}")
    lists = {name: get_origin(hint) is list for name, hint in get_type_hints(cls).items()}
    entries = {str(name).replace("-", "_"): value for name, value in entries.items()}
    if unknown := sorted(entries.keys() - lists.keys()):
        raise CollapseError(f"config: {path} has unknown arguments: {', '.join(unknown)}")
    line = []
    for name, value in entries.items():
        if value is None or isinstance(value, list) and not (lists[name] and value):
            wanted = "one or several values" if lists[name] else "one value"
            raise CollapseError(f"config: {name} in {path} must be {wanted}, got {value!r}")
        if isinstance(value, list):
            line += [f"--{name}", *map(_written, value)]
        else:
            line.append(f"--{name}={_written(value)}")
    return line


def _written(value: Any) -> str:
    """A value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def create_model(args: TrainArgs, pretrained: bool | None = None, **defaults) -> nn.Module:
    """The model that a script trains.

    Args:
        pretrained: With weights; None: as --pretrained says.
        defaults: Arguments of the architecture, which --model_args override.

    Raises:
        CollapseError: No such architecture, or one without these arguments or without weights.
    """
    pretrained = args.pretrained if pretrained is None else pretrained
    return load_model(args.model, "model", pretrained, **{**defaults, **args.model_kwargs}).train()


def start_run(args: TrainArgs, model: nn.Module, dataset, transform: Callable | None = None, images: int = 0, **more):
    """The training, or with --dry_run the estimate of what it costs; a script's loop is the same for both.

    Args:
        args, model, dataset, transform, more: As for `Run`.
        images: In an epoch, where a dry run's `dataset` is only a part of it.
    """
    if args.dry_run:
        return dry_run.DryRun(args, model, dataset, transform, images=images, **more)
    return Run(args, model, dataset, transform, **more)


def run_script(main: Callable[[], None]) -> None:
    """Run a train script's main; what a user can mend is one line, not a stack trace."""
    try:
        main()
    except dry_run.DryRunDone:
        pass
    except (CollapseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        dry_run.clean()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
