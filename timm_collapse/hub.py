"""Saving models in the layout that timm's `local-dir:` and `hf-hub:` read, with the recipe beside the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from .order import CollapseError


def save_model(model: nn.Module, folder: str | Path, recipe: Any = None, half: bool = False, **extra: Any) -> Path:
    """Write config.json, model.safetensors and recipe.json.

    Args:
        model: A registered model (it has a `pretrained_cfg`).
        folder: Where to; `timm.create_model("local-dir:<folder>", pretrained=True)` reads it.
        recipe: Dataclass or dict of the training arguments.
        half: Store the weights in fp16.
        extra: Further entries of recipe.json, e.g. measured numbers.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_for_hf(model, str(folder), model_args=getattr(model, "model_args", None) or None, safe_serialization=True)
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    if recipe is not None or extra:
        values = asdict(recipe) if is_dataclass(recipe) else dict(recipe or {})
        values = {"arguments": values, "parameters": sum(p.numel() for p in model.parameters()), **extra}
        (folder / "recipe.json").write_text(json.dumps(values, indent=1, default=_plain) + "\n")
    return folder


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Load the weights of a trained model of the same architecture into `model`, which may have another image size.

    Args:
        source: A saved model's folder, or a registered name with weights.

    Raises:
        CollapseError: No model there, or one whose weights do not fit.
    """
    try:
        name = f"local-dir:{source}" if Path(source).is_dir() else str(source)
        model.load_state_dict(timm.create_model(name, pretrained=True).state_dict())
    except (OSError, RuntimeError) as error:
        raise CollapseError(f"init: the weights of {str(source)!r} do not fit: {error}") from error


def weights_hash(model: nn.Module) -> str:
    """Twelve hexadecimal digits that another training of the same model does not share."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)
