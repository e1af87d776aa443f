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
from timm.models._input import update_model_args
from torch import nn

from ..collapse.base import Collapsed
from ..models import MAR, CollapseOrder
from ..models.orderer_sources import SETTINGS
from ..models.registry import load_model
from ..order import CollapseError
from .files import BANK_FILE, CONFIG_FILE, ORDERER_FOLDER, RECIPE_FILE, SETTINGS_FILE, WEIGHTS_FILE


def save_model(
    model: nn.Module,
    folder: str | Path,
    recipe: Any = None,
    half: bool | None = False,
    whole: bool = False,
    **extra: Any,
) -> Path:
    """Write config.json, model.safetensors, recipe.json and what belongs to the model: its orderer, its order bank.

    Args:
        model: A registered model (it has a `pretrained_cfg`).
        folder: Where to; `timm.create_model("local-dir:<folder>", pretrained=True)` reads it.
        recipe: Dataclass or dict of the training arguments.
        half: Store the weights in fp16; None: only where that loses nothing.
        whole: A collapsed model's orderer is also written where it is bundled with this package, and would be found.
        extra: Further entries of recipe.json, e.g. measured numbers.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Collapsed) and "orderer" in getattr(model, "_model_args", {}):
        # a name, also where create_model was given an object
        if _needs_its_orderer(model, whole):
            save_orderer(model.orderer, folder / ORDERER_FOLDER, half)
            update_model_args(model, orderer=f"./{ORDERER_FOLDER}")
        elif name := getattr(model.orderer, "baseline_name", None):
            update_model_args(model, orderer=name)
    save_for_hf(model, str(folder), model_args=getattr(model, "model_args", None) or None, safe_serialization=True)
    if isinstance(model, Collapsed):
        _drop_num_classes(folder / CONFIG_FILE)
    if half or half is None and fits_half(model):
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)
    if isinstance(model, MAR):
        (folder / BANK_FILE).unlink(missing_ok=True)  # another model's
        if model.bank is not None:
            model.bank.save(folder / BANK_FILE)
    if recipe is not None or extra:
        values = asdict(recipe) if is_dataclass(recipe) else dict(recipe or {})
        values = {"arguments": values, "parameters": sum(p.numel() for p in model.parameters()), **extra}
        (folder / RECIPE_FILE).write_text(json.dumps(values, indent=1, default=_plain) + "\n")
    return folder


def save_orderer(orderer: CollapseOrder, folder: str | Path, half: bool | None = False) -> Path:
    """Write an orderer's network and how it ranks; `CollapseOrder.from_pretrained(folder)` reads both.

    Raises:
        CollapseError: A baseline, which has nothing to save.
    """
    if orderer.model is None:
        raise CollapseError(f"orderer: the baseline {orderer.baseline_name!r} has no weights; its name is all")
    save_model(orderer.model, folder, half=half)
    settings = {name: getattr(orderer, name) for name in SETTINGS}
    (Path(folder) / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")
    return Path(folder)


def fits_half(model: nn.Module) -> bool:
    """Whether all weights are fp16 numbers, as those are that were read from an fp16 file."""
    return all(torch.equal(v, v.half().to(v)) for v in model.state_dict().values() if v.is_floating_point())


def _drop_num_classes(config_file: Path) -> None:
    """timm writes num_classes twice; transformers' timm wrapper takes it from the top and stumbles over the other."""
    config = json.loads(config_file.read_text())
    config["model_args"].pop("num_classes", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _needs_its_orderer(model: Collapsed, whole: bool) -> bool:
    if not isinstance(model.orderer, CollapseOrder) or model.orderer.model is None:
        return False
    return whole or not timm.is_model(str(model._model_args["orderer"]).split(".")[0])


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Load the weights of a trained model of the same architecture into `model`, which may have another image size.

    Args:
        source: A saved model's folder, or a registered name with weights.

    Raises:
        CollapseError: No model there, or one whose weights do not fit.
    """
    state = load_model(source, "init").state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CollapseError(f"init: the weights of {str(source)!r} do not fit: {error}") from error


def pretrained_source(folder: str | Path) -> dict[str, Any]:
    """A saved ViT as the source of an architecture's pretrained weights: for timm's `pretrained_cfg_overlay`.

    Patch and position embeddings are then resampled to the new model's size, and the head is new where the number of
    classes differs.

    Raises:
        CollapseError: No saved model there.
    """
    file, config = Path(folder) / WEIGHTS_FILE, Path(folder) / CONFIG_FILE
    if not file.is_file() or not config.is_file():
        raise CollapseError(f"init: {folder} has no saved model ({CONFIG_FILE} and {WEIGHTS_FILE})")
    classes = json.loads(config.read_text())["num_classes"]
    return {"file": str(file), "num_classes": classes, "first_conv": "patch_embed.proj", "classifier": "head"}


def weights_hash(model: nn.Module) -> str:
    """Twelve hexadecimal digits that another training of the same model does not share."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)
