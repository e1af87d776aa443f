"""Dry run: what a training costs, from three real steps on a few images; nothing is written but to a folder that goes.

The numbers drawn for all samples of a step, such as the share of masked patches, are the middle of their distribution
in the first step, and its quartiles in the others.
"""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..evaluation.macs import MacCounter
from .args import TrainArgs
from .checkpoint import local
from .distributed import parallelism, processes, side_models
from .run import Run

QUANTILES = (0.5, 0.25, 0.75)
"""Of the draws that all processes share, one for each step."""

_folders: list[str] = []  # that this process made


class DryRunDone(Exception):
    """The dry run has told what it found; nothing of the script is left to do."""


def note(text: str) -> None:
    """Tell the user, once for all processes."""
    if processes().is_main_process:
        print(f"dry run: {text}", file=sys.stderr)


def prepare_arguments(args: TrainArgs) -> None:
    """Change arguments in place: no given weights, and a temporary folder for all that is written."""
    for name in ("init", "pretrained"):
        if getattr(args, name, None):
            note(f"--{name} is ignored, weights are random")
            setattr(args, name, type(getattr(args, name))())
    folder = [""]
    if processes().is_main_process:
        folder = [tempfile.mkdtemp(prefix="dry_run_")]
        _folders.append(folder[0])
    args.output = broadcast_object_list(folder)[0]
    for name in ("latents", "order_table"):
        if getattr(args, name, ""):
            setattr(args, name, str(Path(args.output) / name))
    args.resume, args.tensorboard = "none", False


@atexit.register
def clean() -> None:
    """Remove the temporary folder, if any."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def part_for(args: TrainArgs, dataset: Dataset) -> Dataset:
    """The data set, or in a dry run no more of it than that uses."""
    if not args.dry_run:
        return dataset
    images = len(QUANTILES) * args.batch_size * args.grad_accum * processes().num_processes
    return Subset(dataset, range(min(images, len(dataset))))


class DryRun(Run):
    """Three steps of a run, and then what they tell of it: the same loop of the script, no checkpoint.

    Args:
        args, dataset, more: As for `Run`.
        images: In an epoch; 0: those of `dataset`.
    """

    def __init__(self, args: TrainArgs, model: nn.Module, dataset, *more, images: int = 0, **named):
        self.images, self.asked = images or len(dataset), args.steps
        super().__init__(replace(args, steps=len(QUANTILES)), model, dataset, *more, quiet=True, **named)
        self.macs = 0
        self._saved: dict[int, int] = {}  # storage -> bytes
        self._first, self._contexts = True, ExitStack()
        self._weights = {local(p).untyped_storage().data_ptr() for p in self.bare.parameters()}

    # -- while it runs -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in super().__iter__():
            self.random.quantile = QUANTILES[self.done]
            if self._first:  # MACs and activations are counted in the first micro-step, which is not timed
                self._counter = self._contexts.enter_context(MacCounter())
                hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
                self._contexts.enter_context(hooks)
            yield batch

    def step(self, loss: Tensor, *more, **named) -> None:
        if self._first:
            self._contexts.close()
            self.macs = self._counter.macs // self.args.batch_size
            self._first = False
        super().step(loss, *more, **named)
        self._synchronize()
        if self.done == 1 and self.micro == 0:
            self._start = time.perf_counter()
        elif self.done == len(QUANTILES):
            self.seconds = (time.perf_counter() - self._start) / (len(QUANTILES) - 1)

    def _pack(self, tensor: Tensor) -> Tensor:
        # a weight, or a view of one, is no activation; gathered shards are weights of another storage
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        storage = tensor.untyped_storage()
        if not weight and storage.data_ptr() not in self._weights:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def saved_bytes(self) -> int:
        """What the backward pass needed of the first forward pass, weights apart."""
        return sum(self._saved.values())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- what it found -------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """All findings: parameters and MACs in units, memory of this process in bytes, times in seconds."""
        beside = [p for model in side_models(self.bare) for p in model.parameters()]
        parameters = [*self.bare.parameters(), *beside]
        trained = [p for p in parameters if p.requires_grad]
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        memory = {
            "weights": _bytes([*parameters, *self.bare.buffers()]),
            "gradients": _bytes(trained),
            "optimizer": _bytes(state),
            "ema": _bytes(self.ema.state.values()) if self.ema else 0,
            "activations": self.saved_bytes,
        }
        images = self.images_per_step
        epoch = -(-self.images // images)
        cuda = self.device.type == "cuda"
        return {
            "parameters_trained": sum(p.numel() for p in trained),
            "parameters_frozen": sum(p.numel() for p in parameters) - sum(p.numel() for p in trained),
            "macs_per_image": self.macs,
            "processes": self.world,
            "parallelism": parallelism(self.accelerator),
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "precision": self.args.precision,
            "images_per_step": images,
            "memory_bytes": {**memory, "sum": sum(memory.values())},
            "memory_peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "seconds_per_step": self.seconds,
            "images_per_second": images / self.seconds,
            "images_per_epoch": self.images,
            "steps_per_epoch": epoch,
            "seconds_per_epoch": epoch * self.seconds,
            "steps": self.asked,
            "seconds_in_all": self.asked * self.seconds,
        }

    def finish(self) -> NoReturn:
        """Print a table to stderr and a line of JSON to stdout; raises DryRunDone."""
        report = self.report()
        self.accelerator.wait_for_everyone()
        if self.is_main:
            print_table(report)
            print(json.dumps(report), flush=True)
        raise DryRunDone


def print_table(report: dict[str, Any]) -> None:
    """The report, for people, to stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table("dry run", "", title_justify="left")
    many = f"{report['processes']} x {report['device']}, {report['parallelism']}, precision {report['precision']}"
    peak = report["memory_peak_bytes"]
    rows = {
        "processes": many,
        "parameters, trained": f"{report['parameters_trained']:,}",
        "parameters, frozen": f"{report['parameters_frozen']:,}",
        "forward pass, an image": f"{report['macs_per_image'] / 1e9:.3f} GMACs, frozen parts included",
        **{f"memory, {name}": _gib(value) for name, value in report["memory_bytes"].items()},
        "memory, peak": "not measured on the CPU" if peak is None else _gib(peak),
        "step": f"{report['images_per_step']} images, {report['seconds_per_step']:.3g} s",
        "throughput": f"{report['images_per_second']:.4g} images/s, all processes",
        "epoch": f"{report['steps_per_epoch']:,} steps, {_duration(report['seconds_per_epoch'])}",
        f"--steps {report['steps']}": _duration(report["seconds_in_all"]),
    }
    for row in rows.items():
        table.add_row(*row)
    Console(stderr=True).print(table)


def _bytes(tensors) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
