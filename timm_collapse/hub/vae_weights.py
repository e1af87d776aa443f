"""The AutoencoderKL of diffusers: from a folder, from the Hub, or from the weight file that MAR publishes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..order import CollapseError
from .download import download
from .files import CONFIG_FILE
from .weight_files import read_state_dict

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_vae(vae: nn.Module | str) -> nn.Module:
    """A frozen AutoencoderKL in eval mode: the given one, or that of a local folder or Hub id.

    Raises:
        CollapseError: There is none, it lacks weights, or diffusers is not installed.
    """
    if isinstance(vae, (str, Path)):
        vae = _from_diffusers(str(vae))
    return vae.eval().requires_grad_(False)


def kl16_config() -> dict[str, Any]:
    """Constructor arguments of diffusers' AutoencoderKL for the VAE of Li et al., arXiv 2406.11838: 66.456M parameters.

    256 pixels become 16 x 16 positions of 16 channels.
    """
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",) * 5,
        "block_out_channels": (128, 128, 256, 256, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 256,
        "scaling_factor": 0.2325,
    }


def convert_kl16(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's weights from the layout of the latent diffusion code (LDM), in which MAR publishes, to that of diffusers.

    Args:
        state_dict: Keys `encoder.down.i.block.j...`, `decoder.up.i...`, `quant_conv...`. The discriminator of the
            training (`loss...`) is left out.
    """
    levels = 1 + max((int(m[1]) for m in map(re.compile(r"decoder\.up\.(\d+)\.").match, state_dict) if m), default=-1)
    rules = [
        (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.down\.(\d+)\.", r".down_blocks.\1."),
        (r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}."),  # LDM counts from the finest level
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    ]
    converted = {}
    for key, value in state_dict.items():
        if key.startswith("loss."):
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        converted[key] = value[..., 0, 0] if ".attentions." in key and value.ndim == 4 else value  # 1x1 conv to linear
    return converted


def load_kl16(path: str | Path, config: dict[str, Any] | None = None) -> nn.Module:
    """The AutoencoderKL of a weight file in LDM's layout, such as MAR's `kl16.ckpt`.

    Args:
        path: safetensors, or a torch file, of which nothing but tensors and plain containers is unpickled; the weights
            may lie under "model" or "state_dict".
        config: Constructor arguments of the AutoencoderKL; None takes `kl16_config`.

    Raises:
        CollapseError: No such file, one that cannot be read safely, or weights that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise CollapseError(f"vae: looked for a weight file of KL-16 at {str(path)!r}, there is none")
    state = read_state_dict(path, "vae", "decoder.conv_in.weight")
    vae = _autoencoder_class()(**(config or kl16_config()))
    try:
        found = vae.load_state_dict(convert_kl16(state), strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()  # one line a tensor
        raise CollapseError(f"vae: the weights of {str(path)!r} have other shapes than KL-16: {first}") from error
    if found.missing_keys or found.unexpected_keys:
        raise CollapseError(
            f"vae: {str(path)!r} does not hold KL-16 in LDM's layout (a folder in diffusers' layout is given as a "
            f"folder): missing {_few(found.missing_keys)}; unexpected {_few(found.unexpected_keys)}"
        )
    return vae


def _autoencoder_class() -> type:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise CollapseError("vae: needs the package diffusers: pip install 'timm-collapse[eval]'") from error
    return AutoencoderKL


def _from_diffusers(name: str) -> nn.Module:
    cls = _autoencoder_class()
    local = Path(name).is_dir()
    if not local and "/" not in name:
        raise CollapseError(f"vae: {name!r} is neither a local folder, a weight file, nor a Hub id such as owner/name")
    where = f"the folder {name!r}" if local else f"{name!r}, no local folder, on the Hub (offline: in its cache)"
    looked = f"vae: looked for an AutoencoderKL in diffusers' layout (config.json and its weights) in {where}"
    try:
        if not local:  # checked, and nothing that would have to be unpickled
            download(name, CONFIG_FILE)
            name = str(download(name, DIFFUSERS_WEIGHTS).parent)
        found = cls.load_config(name).get("_class_name", "a model of another library")
        if found != cls.__name__:
            raise CollapseError(f"found {found}")
        vae, report = cls.from_pretrained(name, output_loading_info=True)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CollapseError(f"{looked}: {error or type(error).__name__}") from error
    if report["missing_keys"]:
        raise CollapseError(f"{looked}, but its weights lack {_few(report['missing_keys'])}")
    return vae


def _few(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(sorted(names)[:shown]) or "nothing") + more
