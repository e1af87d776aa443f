"""Reading MAR checkpoints: the official torch files, safetensors, and our own folders; nothing is ever unpickled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.mar import MAR
from ..order import CollapseError
from .files import WEIGHTS_FILE
from .weight_files import KEYS, read_state_dict


def read_mar_checkpoint(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """The state dict of a checkpoint file.

    Args:
        path: `.safetensors`; a torch file as published, with the keys `model_ema` and `model`, or with the tensors
            alone; or a folder that `save_model` wrote. Also of a model inside wrappers (`module.`, `_orig_mod.`,
            `model.`).
        ema: Take `model_ema` where the file has both.

    Raises:
        CollapseError: No such file, one that holds anything but tensors and plain values, or no MAR.
    """
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise CollapseError(f"init: {str(path)!r} is neither a file nor a folder with {WEIGHTS_FILE}")
    own, other = ("model_ema", "model") if ema else ("model", "model_ema")
    state = read_state_dict(file, "init", "z_proj.weight", (own, other, *KEYS))
    if "z_proj.weight" not in state:
        raise CollapseError(f"init: {str(file)!r} holds no MAR")
    return state


def infer_config(state: dict[str, Tensor], **known: Any) -> dict[str, Any]:
    """The arguments of `MAR` that fit a state dict.

    Args:
        known: What tensors do not tell, and what is to be taken instead: attention heads (default: 64 channels each, as
            in base and large, 80 in huge), `vae_embed_dim` (default: patch size 1), `img_size`, `vae_stride`.
    """

    def depth(prefix: str) -> int:
        return 1 + max(int(key.split(".")[prefix.count(".") + 1]) for key in state if key.startswith(prefix + "."))

    def heads(width: int) -> int:
        return width // (80 if width == 1280 else 64) or 1

    width, token_dim = state["z_proj.weight"].shape
    decoder_width = state["decoder_embed.weight"].shape[0]
    length = state["diffusion_pos_embed_learned"].shape[1]
    channels, stride = known.get("vae_embed_dim", token_dim), known.get("vae_stride", 16)
    patch_size = math.isqrt(token_dim // channels)
    classes = state["class_emb.weight"].shape[0] if "class_emb.weight" in state else 0
    return {
        "img_size": math.isqrt(length) * stride * patch_size,
        "vae_stride": stride,
        "patch_size": patch_size,
        "vae_embed_dim": channels,
        "encoder_embed_dim": width,
        "encoder_depth": depth("encoder_blocks"),
        "encoder_num_heads": heads(width),
        "decoder_embed_dim": decoder_width,
        "decoder_depth": depth("decoder_blocks"),
        "decoder_num_heads": heads(decoder_width),
        "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "class_num": classes,
        "buffer_size": state["encoder_pos_embed_learned"].shape[1] - length,
        "diffloss_d": depth("diffloss.net.res_blocks"),
        "diffloss_w": state["diffloss.net.input_proj.weight"].shape[0],
        **known,
    }


def load_mar(path: str | Path, ema: bool = True, **known: Any) -> MAR:
    """A MAR from a checkpoint file alone; its sizes are told from the tensors (see `infer_config`)."""
    state = read_mar_checkpoint(path, ema)
    model = MAR(**infer_config(state, **known))
    _load(model, state, path)
    return model.eval()


def load_mar_weights(model: MAR, path: str | Path, ema: bool = True) -> None:
    """Load a checkpoint into a model of the same size.

    Raises:
        CollapseError: As `read_mar_checkpoint`, or for tensors that do not fit.
    """
    _load(model, read_mar_checkpoint(path, ema), path)


def _load(model: MAR, state: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own
             if k in state and state[k].shape != own[k].shape]  # fmt: skip
    if missing or extra or other:
        found = {"missing": missing, "not known": extra, "of another size": other}
        parts = [f"{what}: {', '.join(n[:3])}{' ...' if len(n) > 3 else ''}" for what, n in found.items() if n]
        raise CollapseError(f"init: {str(path)!r} does not fit the model; {'; '.join(parts)}")
    model.load_state_dict(state)
