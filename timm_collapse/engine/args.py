"""Arguments that every train script has."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import timm

from ..order import CollapseError


@dataclass
class TrainArgs:
    """Arguments of every train script; each adds its own.

    Raises:
        CollapseError: A value out of range, or a model that is not registered.
    """

    model: str = field(default="", metadata={"help": "Registered architecture, see `timm.list_models()`."})
    model_args: str = field(default="{}", metadata={"help": "JSON of further arguments of the architecture."})
    pretrained: bool = field(default=False, metadata={"help": "Start from the architecture's pretrained weights."})
    init: str = field(
        default="",
        metadata={"help": "Start from the weights of this saved model: a folder; some scripts know more, see above."},
    )
    dataset: str = field(
        default="digits",
        metadata={"help": "digits (built in), a folder of images or of parquet files, or a name that timm's "
                          "create_dataset knows; a+b joins two."},
    )  # fmt: skip
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    part: str = field(
        default="",
        metadata={"help": "'i/n': every n-th sample from the i-th on; '!i/n': all others (judges and contestants)."},
    )
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
    grad_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
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
        if self.model:
            check_model_name("model", self.model)
        self.model_kwargs  # noqa: B018  (raises where they are none)
        self.precision = self.precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.precision not in ("no", "bf16", "fp16"):
            raise CollapseError(f"precision: must be no, bf16 or fp16, got {self.precision!r}")
        self.check_range("steps", "batch_size", "grad_accum", "log_every", low=1)
        self.check_range("workers", "clip", "lr")
        self.check_range("warmup", high=1)
        if not 0 <= self.ema < 1:
            raise CollapseError(f"ema: must be in [0, 1), got {self.ema}")
        if self.schedule not in ("cosine", "constant"):
            raise CollapseError(f"schedule: must be cosine or constant, got {self.schedule!r}")
        if self.resume not in ("auto", "none"):
            raise CollapseError(f"resume: must be 'auto' or 'none', got {self.resume!r}")

    def check_range(self, *names: str, low: float = 0, high: float = math.inf) -> None:
        """Raises CollapseError unless these arguments are finite and in [low, high]."""
        for name in names:
            value = getattr(self, name)
            if not low <= value <= high or value == math.inf:
                allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                raise CollapseError(f"{name}: must be {allowed}, got {value}")

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The further arguments of the architecture."""
        try:
            arguments = json.loads(self.model_args)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise CollapseError(
                f"model_args: must be a JSON object such as '{{\"depth\": 6}}', got {self.model_args!r}"
            )
        return arguments


def check_model_name(argument: str, name: str) -> None:
    """Raises CollapseError unless timm knows an architecture, or the name has a source (`local-dir:`, `hf-hub:`)."""
    if not re.search("[:/]", name) and not timm.is_model(name.split(".")[0]):
        raise CollapseError(f"{argument}: {name!r} is not registered; `timm.list_models()` lists the names")
