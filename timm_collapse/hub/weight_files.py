"""Reading files of weights: nothing but tensors and plain values is unpickled, and wrappers' names are taken off."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..order import CollapseError

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt")
"""What a file of weights ends in."""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that (Distributed)DataParallel, `torch.compile`, FSDP and activation checkpointing put in."""
KEYS = ("model", "state_dict", "module")
"""What training files keep their state dict under."""


def read_state_dict(path: Path, argument: str, landmark: str, keys: Iterable[str] = KEYS) -> dict[str, Tensor]:
    """The state dict of a file, under the names that the model itself gives its tensors.

    Args:
        path: safetensors, or a torch file that holds the state dict, alone or under one of `keys`.
        argument: What the user gave the path as: the message of an error begins with it.
        landmark: The name of a tensor that the model surely has. Where it is missing, but there under "model." (the
            model was an attribute), that prefix is taken off, and what is outside of it is left out.
        keys: In order of preference.

    Returns:
        Name -> tensor; empty where there is no state dict.

    Raises:
        CollapseError: A file that is damaged, or holds more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            # training files also hold their arguments as a Namespace: plain values, harmless, and allowed by name
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it stumbles over in a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CollapseError(f"{argument}: {str(path)!r} is damaged or holds more than tensors: {reason}") from error
    if isinstance(state, dict):
        state = next((state[key] for key in keys if key in state), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        return {}
    return unwrapped(state, landmark)


def unwrapped(state: dict[str, Tensor], landmark: str) -> dict[str, Tensor]:
    """A state dict without the names of what was around the model: `WRAPPERS` anywhere, "model." in front."""
    state = {".".join(part for part in name.split(".") if part not in WRAPPERS): state[name] for name in state}
    while landmark not in state and any(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return state
