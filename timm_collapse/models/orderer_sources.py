"""What lies beside the weights of an orderer, in a folder or in the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..hub.download import download, find_file
from ..hub.files import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from ..order import CollapseError

SETTINGS = ("ranking", "damping", "spread", "refine", "evidence", "beta")
"""Attributes of an orderer that are saved beside its network."""


def source_in_hub(name: str) -> tuple[str, dict[str, Any]]:
    """A timm source for a repository or a folder in one, all files checked, and the settings saved beside."""
    path, at, revision = name.partition("@")
    owner, repo, *folder = path.split("/")
    if not all((owner, repo, *folder)):
        raise CollapseError(f"name: expected a Hub id 'owner/name' or 'owner/name/folder', got {name!r}")
    repo, prefix = f"{owner}/{repo}{at}{revision}", "".join(f"{part}/" for part in folder)
    weights = download(repo, f"{prefix}{WEIGHTS_FILE}")
    download(repo, f"{prefix}{CONFIG_FILE}")
    settings = find_file(repo, f"{prefix}{SETTINGS_FILE}")
    return f"local-dir:{weights.parent}", saved_settings(settings)


def saved_settings(file: Path | None) -> dict[str, Any]:
    """What an orderer's file says of SETTINGS; {} where there is none.

    Raises:
        CollapseError: It is damaged.
    """
    if file is None or not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
        # orders of older files were not spread, and as published
        before = {"spread": 0.0, "refine": 0.0, "evidence": "weights", "beta": "even"}
        return {name: {**before, **values}[name] for name in SETTINGS}
    except (ValueError, KeyError, TypeError) as error:
        raise CollapseError(f"name: {file} is damaged: {error!r}") from error
