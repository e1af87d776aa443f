"""Where pretrained weights come from: checked downloads from the Hub, and the files that lie beside the weights.

timm loads weights by itself; what is here runs before it, so that a wrong or missing file is one clear error, and
nothing is ever unpickled: of a Hub repository only safetensors are taken.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from timm.models import PretrainedCfg

from ..order import CollapseError

WEIGHTS = Path(__file__).parent / "weights"
"""Bundled weights: one folder `<architecture>.<tag>` each, in the layout that timm's `local-dir:` reads."""

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
ORDERER_FOLDER = "orderer"
"""Beside the weights of a collapsed model: its orderer, a saved model of its own."""


def download(repo: str, filename: str, cache_dir: str | Path | None = None) -> Path:
    """A file of a Hub repository, from the cache where it is there, checked against the hash that the Hub names it by.

    Args:
        repo: "ME/NAME" or "ME/NAME@revision".
        filename: Path inside the repository.
        cache_dir: None for the Hub's own cache.

    Raises:
        CollapseError: It cannot be had (what was looked for, where, why, and what is bundled), or its content is twice
            another than its hash says.
    """
    from huggingface_hub import hf_hub_download

    name, _, revision = repo.partition("@")
    for again in (False, True):
        try:
            file = Path(
                hf_hub_download(
                    name,
                    filename,
                    revision=revision or None,
                    cache_dir=cache_dir,
                    force_download=again,
                    library_name="timm-collapse",
                )  # fmt: skip
            )
        except Exception as error:  # the Hub's own, the system's, and those of whatever HTTP library it uses
            raise _unavailable(repo, filename, error) from error
        if is_intact(file):
            return file
        blob = file.resolve()
        file.unlink()
        blob.unlink(missing_ok=True)  # else the cache would hold it for good
    raise CollapseError(
        f"pretrained: {filename} of {repo!r} is damaged: twice its content did not have the hash that the Hub gives it"
    )


def find_file(repo: str, filename: str, cache_dir: str | Path | None = None) -> Path | None:
    """As `download`; None where the repository has no such file.

    Offline, a file that was never asked for cannot be told from one that does not exist.
    """
    from huggingface_hub.utils import EntryNotFoundError

    try:
        return download(repo, filename, cache_dir)
    except CollapseError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def is_intact(file: Path) -> bool:
    """Whether a file of the Hub's cache has the content that it is named by; True where the name tells nothing.

    The cache names files by their ETag: the SHA-256 of large files, git's SHA-1 of small ones.
    """
    blob = file.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    else:
        return True
    with open(blob, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest() == blob.name


def hub_source(cfg: PretrainedCfg) -> str:
    """The Hub repository that timm loads a pretrained configuration's weights from; "" for none."""
    elsewhere = cfg.source != "hf-hub" and (cfg.source == "local-dir" or cfg.state_dict or cfg.file)
    return "" if elsewhere else cfg.hf_hub_id or ""


def check_weights(architecture: str, cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> None:
    """Fetch and check the weights that timm is going to load; nothing to do for local ones.

    Raises:
        CollapseError: As `download`; also where the repository has only pickled weights, or the architecture none.
    """
    if not (cfg.has_weights or cfg.file or cfg.state_dict):
        raise CollapseError(
            f"pretrained: {architecture} has no published weights; use pretrained=False, or a saved folder as "
            f"'local-dir:FOLDER'; bundled are {', '.join(bundled_models())}"
        )
    if repo := hub_source(cfg):
        download(repo, str(Path(cfg.hf_hub_filename or WEIGHTS_FILE).with_suffix(".safetensors")), cache_dir)


def find_beside(cfg: PretrainedCfg, filename: str, cache_dir: str | Path | None = None) -> Path | None:
    """A file beside the weights of a pretrained configuration, on disk or in the Hub; None where there is none."""
    if repo := hub_source(cfg):
        return find_file(repo, filename, cache_dir)
    if not cfg.file:
        return None
    folder = Path(cfg.file) if Path(cfg.file).is_dir() else Path(cfg.file).parent  # timm's local-dir: gives the folder
    return folder / filename if (folder / filename).is_file() else None


def find_orderer(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """The folder of the orderer beside the weights of a collapsed model."""
    config = find_beside(cfg, f"{ORDERER_FOLDER}/{CONFIG_FILE}", cache_dir)
    if config is None:
        return None
    if find_beside(cfg, f"{ORDERER_FOLDER}/{WEIGHTS_FILE}", cache_dir) is None:
        raise CollapseError(f"orderer: {config.parent} has a {CONFIG_FILE}, but no {WEIGHTS_FILE}")
    return config.parent


def bundled_models() -> list[str]:
    """Names of the models whose weights come with the package."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if folder.is_dir())


def _unavailable(repo: str, filename: str, error: Exception) -> CollapseError:
    from huggingface_hub import constants

    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    if constants.HF_HUB_OFFLINE:
        place = "the local cache (HF_HUB_OFFLINE is set)"
    else:
        place = f"{constants.ENDPOINT} and the local cache"
    return CollapseError(
        f"pretrained: {filename} of {repo!r} could not be had; looked for in {place}: {reason}. Without a download: "
        f"pretrained=False, a saved folder as 'local-dir:FOLDER', or a bundled model: {', '.join(bundled_models())}"
    )
