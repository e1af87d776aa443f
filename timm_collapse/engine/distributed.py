"""Accelerate's set-up for one process, DDP or FSDP2, on GPUs or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

from ..order import CollapseError


def on_cpu() -> bool:
    """Whether to train on the CPU: it was asked for, or there is nothing else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def processes() -> PartialState:
    """The processes of this training; the state that the accelerator will share.

    Raises:
        CollapseError: Several were started, and each takes itself for the only one.
    """
    state = PartialState(cpu=on_cpu())
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes < started:
        raise CollapseError(
            f"processes: {started} were started, but Accelerate finds no way for them to talk on {state.device}; set "
            "ACCELERATE_USE_CPU=true to train on the CPU"
        )
    return state


def make_accelerator(precision: str, find_unused: bool = False) -> Accelerator:
    """An accelerator, sharded where Accelerate's configuration says so.

    Args:
        precision: no, bf16 or fp16.
        find_unused: Some steps leave parameters without gradient (needed by DDP).

    Raises:
        CollapseError: The configuration asks for FSDP1, or see `processes`.
    """
    state, plugin = processes(), None
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.num_processes > 1:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise CollapseError(f"fsdp_version: must be 2, got {os.environ.get('FSDP_VERSION', '1')}")
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        # Inputs stay float32, as without sharding: they are targets and noise too. Gradients are summed in float32.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, mixed_precision_policy=policy, auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
    # Gradients as views of DDP's buckets: else they take their memory twice.
    kwargs = [DistributedDataParallelKwargs(find_unused_parameters=find_unused, gradient_as_bucket_view=True)]
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu(), fsdp_plugin=plugin, kwargs_handlers=kwargs)
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs alone; torch does on the CPU too
        accelerator.state.fsdp_plugin = plugin
        for each in (state, accelerator.state):  # the second is made from the first again and again
            each.distributed_type = DistributedType.FSDP
    return accelerator


def parallelism(accelerator: Accelerator) -> str:
    """How the processes share the work: "one process", "DDP" or "FSDP2"."""
    if accelerator.is_fsdp2:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def frozen_parts(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The largest parts without trainable parameters, as (parent, name, part)."""
    for name, child in module.named_children():
        trainable = [parameter.requires_grad for parameter in child.parameters()]
        if trainable and not any(trainable):
            yield module, name, child
        else:
            yield from frozen_parts(child)


def side_models(module: nn.Module) -> list[nn.Module]:
    """Models that a model uses, but that are none of its parts, such as the orderer of a collapsed model."""
    return [value for value in vars(module).values() if isinstance(value, nn.Module)]


def block_classes(model: nn.Module) -> list[str]:
    """Names of the classes of transformer blocks (attention and MLP), which are sharded one by one."""
    return sorted({type(m).__name__ for m in model.modules() if hasattr(m, "attn") and hasattr(m, "mlp")})


def prepare(accelerator: Accelerator, model: nn.Module, optimizer, methods: tuple[str, ...] = ()):
    """`accelerator.prepare`, with every transformer block sharded on its own, and frozen parts not at all.

    Frozen parts, such as a VAE, are called outside the model's forward too.

    Args:
        methods: Names of methods other than forward that use weights.

    Raises:
        CollapseError: FSDP2 cannot shard the model.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise CollapseError(f"model: FSDP2 cannot shard the scalar parameter {scalars[0]}; train this one with DDP")
    for other in side_models(model):
        other.to(accelerator.device)
    aside = list(frozen_parts(model))
    for parent, name, part in aside:
        part.to(accelerator.device)
        parent._modules[name] = None  # keeps the place
    try:
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or block_classes(model)
        model, optimizer = accelerator.prepare(model, optimizer)
    finally:
        for parent, name, part in aside:
            parent._modules[name] = part
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model, optimizer
