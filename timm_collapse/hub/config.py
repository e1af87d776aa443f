"""hub_configs/*.json: what is said of a model that can be published."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from ..order import CollapseError

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
        pretrained_cfg: Fields of timm's PretrainedCfg that differ from those of the checkpoint.
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
    pretrained_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
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
        fields = {field.name for field in dataclasses.fields(PretrainedCfg)}
        if unknown := set(self.pretrained_cfg) - fields:
            raise CollapseError(f"pretrained_cfg: {self.name}.json has {sorted(unknown)}, which timm does not know")


def read_config(path: str | Path) -> HubConfig:
    """Read one file of hub_configs/.

    Raises:
        CollapseError: No such file, no JSON object, unknown or missing entries, entries of another type, or a name that
            is not registered.
    """
    path = Path(path)
    if not path.is_file():
        raise CollapseError(f"config: {str(path)!r} is no file; the publishable models are in hub_configs/")
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
