"""Arguments that every train script has, and how scripts read theirs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch

from ..order import CollapseError
from . import dry_run


@dataclass
class TrainArgs:
    """Arguments of every train script."""

    output: str = field(default="runs/run", metadata={"help": "Folder for checkpoints, logs and the final model."})
    steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Images per process and micro-step."})
    grad_accum: int = field(default=1, metadata={"help": "Micro-steps per optimizer step."})
    lr: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay (none on 1-D parameters)."})
    warmup: float = field(default=0.05, metadata={"help": "Share of the steps in linear warm-up."})
    schedule: str = field(default="cosine", metadata={"help": "After the warm-up: cosine (to 0) or constant."})
    clip: float = field(default=1.0, metadata={"help": "Gradient norm is clipped to this; 0 for never."})
    ema: float = field(
        default=0.999, metadata={"help": "EMA decay of the weights that are saved (warmed up); 0 for none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order, augmentation and masks."})
    precision: str = field(
        default="", metadata={"help": "no (fp32), bf16 or fp16 autocast; empty: as Accelerate is configured, else no."}
    )
    workers: int = field(default=0, metadata={"help": "Data loading processes."})
    log_every: int = field(default=20, metadata={"help": "Steps between log lines."})
    checkpoint_minutes: float = field(
        default=5.0, metadata={"help": "Minutes between checkpoints; 0: after every step."}
    )
    resume: str = field(default="auto", metadata={"help": "auto: go on from the folder's checkpoint if any; or none."})
    tensorboard: bool = field(default=True, metadata={"help": "Also write tensorboard events, if it is installed."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Only estimate: three steps on random weights, then parameters, MACs, memory and time on "
                          "stderr, as JSON on stdout; nothing is written."},
    )  # fmt: skip

    def __post_init__(self):
        self.precision = self.precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.precision not in ("no", "bf16", "fp16"):
            raise CollapseError(f"precision: must be no, bf16 or fp16, got {self.precision!r}")
        for name in ("steps", "batch_size", "grad_accum", "log_every"):
            if getattr(self, name) < 1:
                raise CollapseError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "clip", "lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise CollapseError(f"{name}: must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise CollapseError(f"warmup: must be in [0, 1], got {self.warmup}")
        if not 0 <= self.ema < 1:
            raise CollapseError(f"ema: must be in [0, 1), got {self.ema}")
        self._check_model()
        if self.schedule not in ("cosine", "constant"):
            raise CollapseError(f"schedule: must be cosine or constant, got {self.schedule!r}")
        if self.resume not in ("auto", "none"):
            raise CollapseError(f"resume: must be 'auto' or 'none', got {self.resume!r}")

    def _check_model(self) -> None:
        """Of the scripts whose model has a name and arguments."""
        try:
            arguments = json.loads(getattr(self, "model_args", "{}"))
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise CollapseError(
                f"model_args: must be a JSON object such as '{{\"depth\": 6}}', got {self.model_args!r}"
            )
        for name in ("model", "teacher"):
            value = getattr(self, name, "")
            if value and not re.search("[:/]", value) and not timm.is_model(value.split(".")[0]):
                raise CollapseError(f"{name}: {value!r} is not registered; `timm.list_models()` lists the names")


def parse_args(cls: type, description: str, argv: list[str] | None = None):
    """Command line to a dataclass by transformers' HfArgumentParser; `--config file.json|yaml` sets defaults.

    Also seeds torch, so that the model that is built next starts from the seed.
    """
    import sys

    from transformers import HfArgumentParser

    argv = [part for a in (sys.argv[1:] if argv is None else argv) for part in _split_config(a)]
    parser = HfArgumentParser(cls, description=description)
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file; the command line overrides it")
    if "--config" in argv:
        at = argv.index("--config")
        path = Path(argv[at + 1]) if at + 1 < len(argv) else None
        if path is None or not path.is_file():
            parser.error(f"--config needs an existing .json or .yaml file, got {path}")
        import yaml

        values = yaml.safe_load(path.read_text())  # JSON is YAML
        unknown = set(values) - {action.dest for action in parser._actions}
        if unknown:
            parser.error(f"--config {path}: unknown arguments {sorted(unknown)}")
        values = {key: json.dumps(v) if isinstance(v, dict) else v for key, v in values.items()}
        parser.set_defaults(**values)
        del argv[at : at + 2]
    try:
        args, *_, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except CollapseError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.dry_run:
        dry_run.prepare(args)
    torch.manual_seed(args.seed)
    return args


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def run_script(main: Callable[[], None]) -> None:
    """Run a train script's main; what a user can mend is one line, not a stack trace."""
    import sys

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
