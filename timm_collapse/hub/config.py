"""hub_configs/*.json, and what is said of a model that can be published but has no file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import timm

from ..order import CollapseError

TIMM = "timm/"
MANY = 784
"""Patches that a model with resampled, very small ones keeps."""
TASKS = {
    "image-classification": "classifies images",
    "unconditional-image-generation": "generates images",
    "image-feature-extraction": "orders the patches of images",
}
"""Pipeline tags of the Hub that our models have."""


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """One publishable model.

    Attributes:
        name: Name of the file, and of the repository where no other is given.
        architecture: Registered name, without tag.
        summary: One or two sentences: what it is, what it was trained on.
        task: Pipeline tag of the Hub, one of TASKS.
        train: The commands that train it.
        checkpoint: The registered weights that it is published from when no other checkpoint is given; "" for none.
        model_args: Arguments of the architecture.
        datasets, metrics: As the Hub names them.
        license: SPDX name.
        base_model: Hub id of the model that it was fine-tuned from; "" for none.
        results: Sections of docs/results.md whose tables the card quotes.
        folder: Where the file is.
    """

    name: str
    architecture: str
    summary: str
    task: str
    train: tuple[str, ...]
    checkpoint: str = ""
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    license: str = "mit"
    base_model: str = ""
    results: tuple[str, ...] = ()
    folder: Path = Path()

    def __post_init__(self):
        if not timm.is_model(self.architecture):
            raise CollapseError(f"architecture: {self.name}.json names {self.architecture!r}, which is not registered")
        if self.task not in TASKS:
            raise CollapseError(f"task: must be one of {', '.join(TASKS)}, got {self.task!r} in {self.name}.json")
        if self.checkpoint and not timm.is_model_pretrained(self.checkpoint):
            raise CollapseError(f"checkpoint: {self.name}.json names {self.checkpoint!r}, which has no weights")


def read_config(path: str | Path) -> HubConfig:
    """Read one file of hub_configs/; the name of a collapsed model of timm does as well (`derive_config`).

    Raises:
        CollapseError: No such file or name, no JSON object, unknown or missing entries, entries of another type, or an
            architecture that is not registered.
    """
    if is_derivable(str(path)):
        return derive_config(str(path))
    path = Path(path)
    if not path.is_file():
        raise CollapseError(
            f"config: {str(path)!r} is no file, nor a collapsed model of timm; the other publishable models are in "
            "hub_configs/"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CollapseError(f"config: {path} is no JSON: {error}") from error
    fields = {f.name: f for f in dataclasses.fields(HubConfig) if f.name not in ("name", "folder")}
    required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if not isinstance(values, dict) or set(values) - set(fields) or required - set(values):
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        optional = sorted(set(fields) - required)
        raise CollapseError(f"config: {path} must have {sorted(required)} and may have {optional}, got {found}")
    for name, value in values.items():
        wanted = list if "tuple" in fields[name].type else dict if "dict" in fields[name].type else str
        if not isinstance(value, wanted) or wanted is list and not all(isinstance(item, str) for item in value):
            raise CollapseError(f"config: {name} of {path} must be {wanted.__name__}, got {value!r}")
        values[name] = tuple(value) if wanted is list else value
    return HubConfig(name=path.stem, folder=path.resolve().parent, **values)


def is_derivable(name: str) -> bool:
    """Whether an architecture is a model of timm, collapsed, with timm's own weights."""
    return timm.is_model(name) and name.startswith("cvit_") and _timms(name).startswith(TIMM)


def derive_config(name: str) -> HubConfig:
    """The configuration of a model of timm, collapsed: all is known from timm's own, and fine-tuned the same way.

    Args:
        name: Registered architecture, such as "cvit_base_patch16".

    Raises:
        CollapseError: Not `is_derivable`.
    """
    if not is_derivable(name):
        raise CollapseError(f"architecture: {name!r} is no collapsed model with timm's weights")
    cfg, base = timm.get_pretrained_cfg(name), _timms(name)
    patch, own = (int(re.search(r"_patch(\d+)", each)[1]) for each in (name, base))
    patches = (cfg.input_size[1] // patch) ** 2
    resampled, many = patch < own, patch < min(own, 8)  # many patches: as many as timm's model at patch 8 are kept
    keep = MANY if many else 0.22
    if resampled:
        share = MANY if many else "22%"
        what = f" with its weights resampled to patches of {patch} px: it sees {share} of the {patches:,}"
        use = "To be fine-tuned; without that, accuracy suffers from the smaller patches."
        budgets = (196, 392, MANY) if many else (patches // 8, round(0.22 * patches), patches // 2, patches)
        schedule = f"--keep_schedule {','.join(map(str, budgets))} --keep {keep / patches if many else keep:.3g} "
    else:
        what, schedule = ", collapsed: it sees 22% of the", ""
        use = "A backbone: training-free from timm's weights, or fine-tuned with a head."
        if cfg.num_classes:
            use = "Fine-tuned on ImageNet with these orders, or training-free from timm's weights."
    return HubConfig(
        name=name,
        architecture=name,
        summary=f"timm's {base.removeprefix(TIMM)}{what} patches of a photo, those that tell most about the others. "
        f"{use}",
        task="image-classification" if cfg.num_classes else "image-feature-extraction",
        train=(
            "accelerate launch --config_file train/accelerate/multi_gpu.yaml train/cvit.py --dataset path/to/imagenet "
            f"--model {name} --pretrained true {schedule}--steps 50000 --batch_size {64 if many else 128} --lr 1e-4 "
            f"--layer_decay 0.75 --jitter 0.05 --random_orders 0.2 {'--grad_checkpointing true ' * many}"
            f"--precision bf16 --output runs/{name}",
        ),
        checkpoint=f"{name}.{cfg.tag}",
        model_args={"keep": keep},
        datasets=("ILSVRC/imagenet-1k",),
        metrics=("accuracy",) if cfg.num_classes else (),
        license="other" if "license" in cfg.license else cfg.license,  # a licence of its own has no SPDX name
        base_model=base,
    )


def _timms(name: str) -> str:
    """The Hub id of the weights that timm has for an architecture; "" where they are elsewhere."""
    return timm.get_pretrained_cfg(name).hf_hub_id or ""
