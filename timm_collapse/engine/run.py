"""Run: Accelerate set-up, schedule, EMA, checkpoints, logs and progress of one training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import StepLoader
from ..models.transformer import use_plain_attention
from ..order import CollapseError
from .args import TrainArgs
from .checkpoint import copy_state, gathered, load_optimizer, read_checkpoint, without_weights, write_checkpoint
from .distributed import frozen_parts, make_accelerator, prepare
from .draws import Draws
from .ema import Ema

MAY_CHANGE = ("output", "workers", "log_every", "checkpoint_minutes", "resume", "tensorboard", "steps", "dry_run")
"""Arguments that a resumed run may change; with other `steps` the schedule is that of the new number."""
TOGETHER = ("batch_size", "grad_accum")
"""These may change with the number of processes, if their product stays: the images of an optimizer step."""


class Run:
    """One training run.

    Iterating yields batches on the device for every micro-step that is left; `step` must be called once for each. It
    is one training whatever the number of processes and the parallelism, see `distributed` and `Draws`.

    Args:
        args: The script's arguments.
        model: What is trained. On a CPU its attention is no longer fused, which is faster there.
        dataset: Map-style (image, label, ...): what a batch holds.
        transform: Image -> tensor; None where the data set yields tensors.
        find_unused: Some steps leave parameters without gradient (needed by DDP).
        param_groups: For the optimizer, as timm makes them (`lr_scale` is a factor on the learning rate); None: all
            parameters, without weight decay on 1-D ones.
        quiet: No progress bar and no tensorboard.
        methods: Names of methods of the model, other than forward, that the script calls and that use weights.

    Attributes:
        model: What `forward` is called on. bare: The same model, for its attributes and other methods.
        random: The random numbers of the current micro-step, see `Draws`: `random.rand(batch, 64)`, `random.uniform()`.
        device: Of this process. rank, world: This process and the number of processes. is_main: Whether rank is 0.
        done: Optimizer steps so far. steps: In all.
    """

    def __init__(
        self,
        args: TrainArgs,
        model: nn.Module,
        dataset,
        transform: Callable | None = None,
        find_unused: bool = False,
        param_groups: list[dict[str, Any]] | None = None,
        quiet: bool = False,
        methods: tuple[str, ...] = (),
    ):
        self.args, self.quiet = args, quiet
        self.output = Path(args.output)
        self.accelerator = make_accelerator(args.precision, find_unused)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.random = Draws(args.seed, self.rank, self.world, self.device)
        if args.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise CollapseError(f"grad_checkpointing: {type(model).__name__} cannot recompute its activations")
            model.set_grad_checkpointing()
        if param_groups is None:
            decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
            no_decay = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
            param_groups = [
                {"params": decay, "weight_decay": args.weight_decay},
                {"params": no_decay, "weight_decay": 0.0},
            ]
        optimizer = torch.optim.AdamW(param_groups, lr=args.lr, betas=(0.9, 0.95))
        if self.device.type == "cpu":
            use_plain_attention(model)
        self._plain = without_weights(model, [part for _, _, part in frozen_parts(model)])
        self.model, self.optimizer = prepare(self.accelerator, model, optimizer, methods)
        self.bare = self.accelerator.unwrap_model(self.model)
        self.ema = Ema(self.bare, args.ema) if args.ema else None
        self.done, self.steps = 0, args.steps  # optimizer steps
        self.micro = 0  # micro-steps within the current one
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if args.resume == "auto":
            self._load_checkpoint()
            done = torch.tensor(float(self.done), device=self.device)
            if self.accelerator.reduce(done, "mean") != self.done:
                raise CollapseError("output: must be on storage that all processes see; only some found its checkpoint")
        self._trim_log()
        left = range(self.done * args.grad_accum, self.steps * args.grad_accum)
        self.loader = StepLoader(
            dataset, transform, args.batch_size, left, args.seed, self.rank, self.world, args.workers
        )
        self._reseed()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        from tqdm.auto import tqdm

        self._writer = self._tensorboard()
        self._bar = tqdm(
            total=self.steps, initial=self.done, disable=self.quiet or not self.is_main, dynamic_ncols=True,
            desc=self.output.name,
        )  # fmt: skip
        self._saved_at = time.monotonic()
        for batch in self.loader:
            self._reseed()
            if isinstance(self.model, DistributedDataParallel):  # gradients are summed once an optimizer step
                self.model.require_backward_grad_sync = self.micro + 1 == self.args.grad_accum
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)
        self._bar.close()

    def _reseed(self) -> None:
        """All randomness of a micro-step comes from the seed and its number."""
        number = self.done * self.args.grad_accum + self.micro
        self.random.restart(number)
        local = self.args.seed * 32_452_843 + number * self.world + self.rank
        torch.manual_seed(local)
        np.random.seed(local % 2**32)  # timm's Mixup

    @property
    def progress(self) -> float:
        """Share of the optimizer steps done, in [0, 1)."""
        return self.done / self.steps

    def lr_at(self, step: int) -> float:
        warmup = max(1, round(self.args.warmup * self.args.steps))
        if step < warmup:
            return self.args.lr * (step + 1) / warmup
        if self.args.schedule == "constant":
            return self.args.lr
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.args.steps - warmup)))

    def step(
        self, loss: Tensor, metrics: dict[str, Tensor | float] | None = None, frozen: list[nn.Parameter] | None = None
    ) -> None:
        """Backward, and after `grad_accum` calls an optimizer step, EMA, log and checkpoint.

        Args:
            loss: Scalar, mean over this process's batch.
            metrics: Scalars to log, averaged over steps and processes.
            frozen: Parameters that this step must not move (their gradients are discarded).

        Raises:
            CollapseError: The loss is not finite.
        """
        if not torch.isfinite(loss.detach()).all():
            raise CollapseError(f"loss: not finite ({loss.item()}) at step {self.done}; lower lr or use precision bf16")
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.done) * group.get("lr_scale", 1.0)
        self.micro += 1
        self.accelerator.backward(loss / self.args.grad_accum)
        for name, value in (metrics or {"loss": loss}).items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.micro < self.args.grad_accum:
            return
        self.micro = 0
        for parameter in frozen or []:
            parameter.grad = None  # AdamW skips these altogether
        if self.args.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.ema:
            self.ema.update(self.bare, self.done)
        self._bar.update(1)
        if self.done % self.args.log_every == 0 or self.done == self.args.steps:
            self._log()
        if self._checkpoint_is_due():
            self.save_checkpoint()

    def finish(self) -> nn.Module:
        """Save the last checkpoint, and make one plain model of the trained one.

        Returns:
            The trained (EMA) model, whole and without any wrapper, in eval mode: a copy of the one that the run was
            given, so settings that the script changed since, such as `keep`, are those of the start. Where it was
            sharded, only the main process has its weights; on the others they are on the meta device.
        """
        self.save_checkpoint()
        if self._writer:
            self._writer.close()
        state = gathered(self.ema.state if self.ema else self.bare.state_dict(), keep=self.is_main)
        if all(value is not None for value in state.values()):
            self._plain.load_state_dict(state, assign=True)
            self._plain.to(self.device)
        self.accelerator.wait_for_everyone()
        return self._plain.eval()

    # -- logs ----------------------------------------------------------------------------------------------------------

    def _tensorboard(self):
        if not (self.args.tensorboard and self.is_main and not self.quiet):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.output / "tensorboard"), purge_step=self.done)

    def _log(self) -> None:
        values = {name: total.item() / self._counts[name] for name, total in self._reduced_sums().items()}
        self._sums, self._counts = {}, {}
        if not self.is_main:
            return
        self._bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()}, refresh=False)
        line = {"step": self.done, "lr": self.lr_at(self.done - 1), **values}
        with open(self.output / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, self.done)

    def _reduced_sums(self) -> dict[str, Tensor]:
        """The sums of the metrics since the last log line, averaged over the processes."""
        return {name: self.accelerator.reduce(value, "mean") for name, value in sorted(self._sums.items())}

    def _trim_log(self) -> None:
        """A resumed run drops the log lines after its checkpoint; a new one starts an empty log."""
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            log = self.output / "log.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            log.write_text("".join(f"{x}\n" for x in lines if x.endswith("}") and json.loads(x)["step"] <= self.done))
            (self.output / "args.json").write_text(json.dumps(asdict(self.args), indent=1) + "\n")
        self.accelerator.wait_for_everyone()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        """The main process's clock decides for all: each on its own, they would wait for each other for ever."""
        due = time.monotonic() - self._saved_at >= 60 * self.args.checkpoint_minutes
        if self.world == 1:
            return due
        flag = torch.tensor(float(due and self.is_main), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def save_checkpoint(self) -> None:
        """Write all state to `checkpoint.pt`, atomically, in one form whatever the parallelism."""
        self._saved_at = time.monotonic()
        whole = {
            "model": self.bare.state_dict(),
            "ema": self.ema.state if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }
        state = {
            "done": self.done,
            "args": json.dumps(asdict(self.args)),
            "images_per_step": self.images_per_step,
            **gathered(whole, keep=self.is_main),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "sums": {name: value.cpu() for name, value in self._reduced_sums().items()},
            "counts": self._counts,
        }
        if self.is_main:
            write_checkpoint(state, self.output / "checkpoint.pt")
        self.accelerator.wait_for_everyone()

    @property
    def images_per_step(self) -> int:
        """Of all processes, in one optimizer step."""
        return self.args.batch_size * self.args.grad_accum * self.world

    def _load_checkpoint(self) -> None:
        path = self.output / "checkpoint.pt"
        if not path.exists():
            return
        state = read_checkpoint(path)
        try:
            copy_state(self.bare.state_dict(), state["model"])
        except CollapseError as error:
            raise CollapseError(f"output: {path} holds another model; choose another folder. {error}") from error
        now, then = asdict(self.args), json.loads(state["args"])
        images = state.get("images_per_step")
        if images is not None:
            now["images a step"], then["images a step"] = self.images_per_step, images
        may_change = MAY_CHANGE + (TOGETHER if images is not None else ())
        changed = [key for key in now if now[key] != then.get(key) and key not in may_change]
        if changed:
            listed = ", ".join(f"{key} {then.get(key)!r} -> {now[key]!r}" for key in changed)
            raise CollapseError(
                f"resume: {path} was made with other arguments ({listed}); choose another output folder"
            )
        if self.ema:
            copy_state(self.ema.state, state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.done, self._counts = state["done"], state["counts"]
        self._sums = {name: value.to(self.device, copy=True) for name, value in state["sums"].items()}
