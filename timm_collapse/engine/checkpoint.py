"""One checkpoint file whatever the parallelism: shards are gathered to be written, and cut again to be read."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from ..order import CollapseError


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; of one that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, keep: bool) -> Any:
    """Dicts and lists with their sharded tensors whole, on the CPU; every process must call this.

    Args:
        value: Nested dicts and lists.
        keep: False: this process only takes part, and gets None for each sharded tensor.
    """
    if isinstance(value, DTensor):
        whole = value.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gathered(each, keep) for key, each in value.items()}
    if isinstance(value, list):
        return [gathered(each, keep) for each in value]
    return value


def laid_out_as(like: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, and sharded as that is; every process has the whole one."""
    whole = whole.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, like.placements)


@torch.no_grad()
def copy_state(into: dict[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, sharded or not.

    Raises:
        CollapseError: Other names or shapes.
    """
    wrong = sorted(into.keys() ^ whole.keys())
    wrong += [name for name in into.keys() & whole.keys() if into[name].shape != whole[name].shape]
    if wrong:
        raise CollapseError(f"{len(wrong)} tensors are missing, unknown or of another shape, the first {wrong[0]}")
    for name, tensor in into.items():
        local(tensor).copy_(local(laid_out_as(tensor, whole[name])))


def load_optimizer(optimizer: Optimizer, whole: dict[str, Any]) -> None:
    """Load a whole optimizer state into an optimizer whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: laid_out_as(parameters[index], value) if value.ndim else value.clone() for key, value in entry.items()
        }
        for index, entry in whole["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def without_weights(model: nn.Module, shared: list[nn.Module]) -> nn.Module:
    """A copy of a model that takes no memory: its parameters are on the meta device.

    Args:
        shared: Frozen parts that the copy has in common with the model.
    """
    memo: dict[int, Any] = {id(part): part for part in shared}
    kept = {id(p) for part in shared for p in part.parameters()}
    for p in model.parameters():
        if id(p) not in kept:
            memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: a killed run leaves the previous one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without loading it: its tensors are mapped, so that each process reads what it needs."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
