"""Run: Accelerate set-up, schedule, EMA, checkpoints, logs and progress of one training."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import StepLoader
from ..models.transformer import use_plain_attention
from ..order import CollapseError
from .args import TrainArgs

MAY_CHANGE = ("output", "workers", "log_every", "checkpoint_minutes", "resume", "tensorboard", "steps")
"""Arguments that a resumed run may change; with other `steps` the schedule is that of the new number."""


class Run:
    """One training run.

    Iterating yields (images, labels) on the device for every micro-step that is left; `step` must be called once for
    each.

    Args:
        args: The script's arguments.
        model: What is trained; its `forward` computes the loss.
        dataset, transform: Training data: map-style (PIL image, label), and PIL image -> tensor.
        find_unused: Some steps leave parameters without gradient (needed by DDP).
        param_groups: For the optimizer, as timm makes them (`lr_scale` is a factor on the learning rate); None: all
            parameters, without weight decay on 1-D ones.
    """

    def __init__(
        self,
        args: TrainArgs,
        model: nn.Module,
        dataset,
        transform: Callable,
        find_unused: bool = False,
        param_groups: list[dict[str, Any]] | None = None,
        quiet: bool = False,
    ):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from timm.utils import ModelEmaV3

        self.args, self.quiet = args, quiet
        self.output = Path(args.output)
        kwargs = [DistributedDataParallelKwargs(find_unused_parameters=find_unused)]
        self.accelerator = Accelerator(mixed_precision=args.precision, kwargs_handlers=kwargs)
        self.is_main = self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if param_groups is None:
            decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
            no_decay = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
            param_groups = [
                {"params": decay, "weight_decay": args.weight_decay},
                {"params": no_decay, "weight_decay": 0.0},
            ]
        optimizer = torch.optim.AdamW(param_groups, lr=args.lr, betas=(0.9, 0.95))
        if self.accelerator.device.type == "cpu":
            use_plain_attention(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.bare = self.accelerator.unwrap_model(self.model)
        self.ema = ModelEmaV3(self.bare, decay=args.ema, use_warmup=True) if args.ema else None
        self.done = 0  # optimizer steps
        self.micro = 0  # micro-steps within the current one
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if args.resume == "auto":
            self._load_checkpoint()
        self._trim_log()
        left = range(self.done * args.grad_accum, args.steps * args.grad_accum)
        self.loader = StepLoader(
            dataset, transform, args.batch_size, left, args.seed, self.rank, self.world, args.workers
        )
        self._reseed()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from tqdm.auto import tqdm

        self._writer = self._tensorboard()
        self._bar = tqdm(
            total=self.args.steps, initial=self.done, disable=self.quiet or not self.is_main, dynamic_ncols=True,
            desc=self.output.name,
        )  # fmt: skip
        self._saved_at = time.monotonic()
        for images, labels in self.loader:
            self._reseed()
            yield images.to(self.accelerator.device), labels.to(self.accelerator.device)
        self._bar.close()

    def _reseed(self) -> None:
        """All randomness of a micro-step comes from the seed and its number."""
        number = self.done * self.args.grad_accum + self.micro
        self.generator = torch.Generator().manual_seed(self.args.seed * 15_485_863 + number)
        local = self.args.seed * 32_452_843 + number * self.world + self.rank
        torch.manual_seed(local)
        np.random.seed(local % 2**32)  # timm's Mixup

    @property
    def progress(self) -> float:
        """Share of the optimizer steps done, in [0, 1)."""
        return self.done / self.args.steps

    def rand(self, batch: int, *shape: int) -> Tensor:
        """Uniform (batch, *shape) for this process: its part of one draw for the global batch."""
        return self._own(torch.rand(batch * self.world, *shape, generator=self.generator), batch)

    def randn(self, batch: int, *shape: int) -> Tensor:
        """Normal (batch, *shape) for this process: its part of one draw for the global batch."""
        return self._own(torch.randn(batch * self.world, *shape, generator=self.generator), batch)

    def randint(self, low: int, high: int) -> int:
        """One integer in [low, high), the same in every process."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def uniform(self) -> float:
        """One number in [0, 1), the same in every process."""
        return float(torch.rand((), generator=self.generator))

    def _own(self, drawn: Tensor, batch: int) -> Tensor:
        return drawn[self.rank * batch : (self.rank + 1) * batch].to(self.accelerator.device)

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
            self._sums[name] = self._sums.get(name, 0.0) + torch.as_tensor(value, dtype=torch.float32).detach().cpu()
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
            self.ema.update(self.bare, step=self.done)
        self._bar.update(1)
        if self.done % self.args.log_every == 0 or self.done == self.args.steps:
            self._log()
        if self._checkpoint_is_due():
            self.save_checkpoint()

    def finish(self) -> nn.Module:
        """Save the last checkpoint; returns the trained (EMA) model on every process."""
        self.save_checkpoint()
        if self._writer:
            self._writer.close()
        self.accelerator.wait_for_everyone()
        return (self.ema.module if self.ema else self.bare).eval()

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
        values = {name: self.accelerator.reduce(v.to(self.accelerator.device), "mean").item() / self._counts[name]
                  for name, v in sorted(self._sums.items())}  # fmt: skip
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
        """Write all state to `checkpoint.pt`, atomically: a killed run leaves the previous one."""
        self._saved_at = time.monotonic()
        if self.is_main:
            state = {
                "done": self.done,
                "args": json.dumps(asdict(self.args)),
                "model": self.bare.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "sums": self._sums,
                "counts": self._counts,
            }
            temporary = self.output / "checkpoint.tmp"
            torch.save(state, temporary)
            os.replace(temporary, self.output / "checkpoint.pt")
        self.accelerator.wait_for_everyone()

    def _load_checkpoint(self) -> None:
        path = self.output / "checkpoint.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.bare.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CollapseError(f"output: {path} holds another model; choose another folder. {error}") from error
        now, then = asdict(self.args), json.loads(state["args"])
        changed = [key for key in now if now[key] != then.get(key) and key not in MAY_CHANGE]
        if changed:
            listed = ", ".join(f"{key} {then.get(key)!r} -> {now[key]!r}" for key in changed)
            raise CollapseError(
                f"resume: {path} was made with other arguments ({listed}); choose another output folder"
            )
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.done, self._sums, self._counts = state["done"], state["sums"], state["counts"]
