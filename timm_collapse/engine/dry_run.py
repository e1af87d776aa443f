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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..evaluation.macs import MacCounter
from .checkpoint import local
from .distributed import parallelism, processes

if TYPE_CHECKING:
    from .args import TrainArgs
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


def prepare(args: TrainArgs) -> None:
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


class NoiseCodec(nn.Module):
    """Stands for a VAE that is not at hand: its latents are noise.

    Args:
        latent_shape: (C, h, w). img_size: Of the images, in pixels.
    """

    scale = 1.0

    def __init__(self, latent_shape: tuple[int, int, int], img_size: int):
        super().__init__()
        self.channels, self.stride = latent_shape[0], img_size // latent_shape[1]
        self.identity = {"kind": "noise"}

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> mean 0 and standard deviation 1, (B, C, h, w) each."""
        side = images.shape[-1] // self.stride
        mean = images.new_zeros(len(images), self.channels, side, side)
        return mean, mean + 1


class DryRun:
    """Measures a run: `Run` calls `before_forward`, `after_forward` and `after_step` in every micro-step.

    Args:
        run: The run.
        images: In an epoch.
    """

    def __init__(self, run: Run, images: int):
        self.run, self.images = run, images
        self.macs, self.saved, self.first = 0, {}, True
        self._stack: list[Any] = []
        self._weights: set[int] = set()

    # -- while it runs -------------------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """MACs and activations are counted in the first micro-step, which is not timed."""
        self.run.quantile = QUANTILES[self.run.done]
        if not self.first:
            return
        for parameter in self.run.bare.parameters():
            self._weights.add(local(parameter).untyped_storage().data_ptr())
        self._counter = MacCounter()
        self._stack = [self._counter, torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)]
        for context in self._stack:
            context.__enter__()

    def after_forward(self) -> None:
        if not self.first:
            return
        for context in reversed(self._stack):
            context.__exit__(None, None, None)
        self.macs = self._counter.macs // self.run.args.batch_size
        self.first = False

    def after_step(self) -> None:
        """After an optimizer step."""
        self._synchronize()
        if self.run.done == 1:
            self._start = time.perf_counter()
        elif self.run.done == len(QUANTILES):
            self.seconds = (time.perf_counter() - self._start) / (len(QUANTILES) - 1)

    def _pack(self, tensor: Tensor) -> Tensor:
        # a weight, or a view of one, is no activation; gathered shards are weights of another storage
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        storage = tensor.untyped_storage()
        if not weight and storage.data_ptr() not in self._weights:
            self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _synchronize(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    # -- what it found -------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """All findings: parameters and MACs in units, memory of this process in bytes, times in seconds."""
        run, args = self.run, self.run.args
        parameters = list(run.bare.parameters())
        trained = [p for p in parameters if p.requires_grad]
        state = [v for entry in run.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        memory = {
            "weights": _bytes([*parameters, *run.bare.buffers()]),
            "gradients": _bytes(trained),
            "optimizer": _bytes(state),
            "ema": _bytes(run.ema.state.values()) if run.ema else 0,
            "activations": sum(self.saved.values()),
        }
        images = args.batch_size * args.grad_accum * run.world
        epoch = -(-self.images // images)
        cuda = run.device.type == "cuda"
        return {
            "parameters_trained": sum(p.numel() for p in trained),
            "parameters_frozen": sum(p.numel() for p in parameters) - sum(p.numel() for p in trained),
            "macs_per_image": self.macs,
            "processes": run.world,
            "parallelism": parallelism(run.accelerator),
            "device": torch.cuda.get_device_name(run.device) if cuda else run.device.type,
            "precision": args.precision,
            "images_per_step": images,
            "memory_bytes": {**memory, "sum": sum(memory.values())},
            "memory_peak_bytes": torch.cuda.max_memory_allocated(run.device) if cuda else None,
            "seconds_per_step": self.seconds,
            "images_per_second": images / self.seconds,
            "images_per_epoch": self.images,
            "steps_per_epoch": epoch,
            "seconds_per_epoch": epoch * self.seconds,
            "steps": args.steps,
            "seconds_in_all": args.steps * self.seconds,
        }

    def finish(self) -> None:
        """Print a table to stderr and a line of JSON to stdout; raises DryRunDone."""
        report = self.report()
        self.run.accelerator.wait_for_everyone()
        if self.run.is_main:
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
