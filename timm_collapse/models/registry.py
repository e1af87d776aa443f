"""What every model of the package shares with timm's registry: pretrained configurations and building."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import nn

from ..hub.download import WEIGHTS, loading, local_weights
from ..hub.files import WEIGHTS_FILE
from ..order import CollapseError

TIN_MEAN, TIN_STD = (0.480, 0.448, 0.398), (0.277, 0.269, 0.282)


def pixel_cfg(
    tag_folder: str = "", img_size: int = 64, mean=TIN_MEAN, std=TIN_STD, in_chans: int = 3, **fields: Any
) -> dict[str, Any]:
    """A timm pretrained configuration; with a folder name its weights are the bundled ones."""
    cfg = {
        "input_size": (in_chans, img_size, img_size),
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 0,
        "license": "mit",
        **fields,
    }
    if tag_folder:
        cfg["file"] = str(WEIGHTS / tag_folder / WEIGHTS_FILE)
    return cfg


def take_pretrained_cfg(variant: str, kwargs: dict[str, Any]) -> PretrainedCfg:
    """The configuration that `create_model`'s arguments give, or the registered one; taken out of the arguments."""
    return resolve_pretrained_cfg(
        variant, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    )


def build(cls: type[nn.Module], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]):
    """Build a registered model: the architecture's defaults, overridden by the caller's arguments."""
    arguments = {**defaults, **kwargs}
    if isinstance(size := arguments.get("img_size"), (list, tuple)):  # timm's config.json holds [H, W]
        if size[0] != size[-1]:
            raise CollapseError(f"img_size: must be square, got {tuple(size)}")
        arguments["img_size"] = size[0]
    if arguments.get("in_chans", 3) != 3:
        raise CollapseError(f"in_chans: only RGB (3) is supported, got {arguments['in_chans']}")
    cfg = take_pretrained_cfg(variant, arguments)
    arguments["pretrained_cfg"] = local_weights(variant, cfg, arguments.get("cache_dir")) if pretrained else cfg
    model = build_model_with_cfg(
        cls, variant, pretrained, kwargs_filter=("num_classes", "global_pool", "in_chans"), **arguments
    )
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    model.num_classes = model.num_features = 0
    # save_for_hf writes these into config.json, so that local-dir: and hf-hub: rebuild the same shape
    model.model_args = {k: v for k, v in kwargs.items() if not k.startswith("pretrained") and k != "cache_dir"}
    return model


def register(name: str, make: Callable[[str, bool, dict[str, Any]], nn.Module], module: str, about: str) -> None:
    """Register an architecture with timm, as its decorator does, where several are made by one function.

    Args:
        name: Of the architecture.
        make: Builds it from its name, whether it is pretrained, and the caller's arguments.
        module: `__name__` of the module that has its `default_cfgs`.
        about: Its docstring.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return make(name, pretrained, kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__, entrypoint.__doc__ = module, about
    register_model(entrypoint)


def load_model(name: str | Path, argument: str, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A model in eval mode, or why there is none.

    Args:
        name: A registered model, a local folder (with or without `local-dir:`), or `hf-hub:` and an id.
        argument: What the user gave the name as; the message begins with it.
        kwargs: For `timm.create_model`.

    Raises:
        CollapseError: Nothing of that name, no weights, or others than its architecture has.
    """
    folder = Path(str(name).removeprefix("local-dir:"))
    source = f"local-dir:{folder}" if folder.is_dir() else str(name)
    with loading(f"{argument}: {str(name)!r}"):
        return timm.create_model(source, pretrained, **kwargs).eval()
