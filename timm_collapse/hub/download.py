"""Where pretrained weights come from: checked downloads from the Hub, and the files that lie beside the weights.

What is here runs before timm loads, so that a wrong or missing file is one clear error, and nothing is ever unpickled:
of a Hub repository only safetensors are taken.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import Tensor

from ..order import CollapseError
from .files import CONFIG_FILE, ORDERER_FOLDER, SETTINGS_FILE, WEIGHTS_FILE

WEIGHTS = Path(__file__).parents[1] / "models" / "weights"
"""Bundled weights: one folder `<architecture>.<tag>` each, in the layout that timm's `local-dir:` reads."""

ATTEMPTS = 3
"""Downloads of one file, where what came was damaged or the connection broke; the client retries by itself, too."""


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
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    name, _, revision = repo.partition("@")
    for attempt in range(ATTEMPTS):
        try:
            file = Path(
                hf_hub_download(
                    name, filename, revision=revision or None, cache_dir=cache_dir, library_name="timm-collapse"
                )
            )
        except Exception as error:  # the Hub's own, the system's, and those of whatever HTTP library it uses
            answered = isinstance(error, (HfHubHTTPError, EntryNotFoundError, HFValidationError))
            if answered or attempt == ATTEMPTS - 1:
                raise _unavailable(repo, filename, error) from error
            continue  # the connection broke, or less came than was announced
        content, number = file.resolve(), file.stat().st_ino
        if is_intact(file):
            return file
        if content.exists() and content.stat().st_ino == number:  # no other process has fetched it again
            content.unlink(missing_ok=True)  # else the cache would hold it for good
            file.unlink(missing_ok=True)
    raise CollapseError(
        f"pretrained: {filename} of {repo!r} is damaged: {ATTEMPTS} times its content did not have the hash that the "
        "Hub gives it"
    )


def find_file(repo: str, filename: str, cache_dir: str | Path | None = None) -> Path | None:
    """As `download`; None where the repository has no such file, also if only the cache remembers that."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return download(repo, filename, cache_dir)
    except CollapseError as error:
        name, _, revision = repo.partition("@")
        cached = try_to_load_from_cache(name, filename, cache_dir, revision or None)
        if isinstance(error.__cause__, RemoteEntryNotFoundError) or cached is _CACHED_NO_EXIST:
            return None
        folder = f"{filename.rpartition('/')[0]}/".lstrip("/")
        whole = try_to_load_from_cache(name, f"{folder}{CONFIG_FILE}", cache_dir, revision or None)
        if HF_HUB_OFFLINE and isinstance(whole, str):  # fetched by a tool that does not note what is missing
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


def local_weights(architecture: str, cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> PretrainedCfg:
    """The configuration with its weights on disk: fetched from the Hub, and checked; local ones stay where they are.

    Raises:
        CollapseError: As `download`; also where the repository has only pickled weights, or the architecture none.
    """
    if not (cfg.has_weights or cfg.file or cfg.state_dict):
        raise CollapseError(
            f"pretrained: {architecture} has no published weights; use pretrained=False, or a saved folder as "
            f"'local-dir:FOLDER'; bundled are {', '.join(bundled_models())}"
        )
    if not (repo := hub_source(cfg)):
        return cfg
    file = download(repo, str(Path(cfg.hf_hub_filename or WEIGHTS_FILE).with_suffix(".safetensors")), cache_dir)
    return replace(cfg, file=str(file), source="", custom_load=False)


def without_weight(cfg: PretrainedCfg, name: str) -> tuple[PretrainedCfg, Tensor | None]:
    """A pretrained configuration on disk without one of its tensors, and that tensor; None where it has none."""
    file = Path(cfg.file) if cfg.file and Path(cfg.file).is_file() else find_beside(cfg, WEIGHTS_FILE)
    if file is None or file.suffix != ".safetensors":
        return cfg, None
    with loading(f"pretrained: {str(file)!r}"):
        with safe_open(file, "pt") as tensors:
            if name not in tensors.keys():
                return cfg, None
        state = load_file(file)
    tensor = state.pop(name)
    return replace(cfg, state_dict=state, file=None, source=""), tensor


def find_beside(cfg: PretrainedCfg, filename: str, cache_dir: str | Path | None = None) -> Path | None:
    """A file beside the weights of a pretrained configuration, on disk or in the Hub; None where there is none."""
    if repo := hub_source(cfg):
        return find_file(repo, filename, cache_dir)
    if not cfg.file:
        return None
    folder = Path(cfg.file) if Path(cfg.file).is_dir() else Path(cfg.file).parent  # timm's local-dir: gives the folder
    return folder / filename if (folder / filename).is_file() else None


def find_orderer(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """The folder of the orderer beside the weights of a collapsed model; all its files are there."""
    config = find_beside(cfg, f"{ORDERER_FOLDER}/{CONFIG_FILE}", cache_dir)
    if config is None:
        return None
    if find_beside(cfg, f"{ORDERER_FOLDER}/{WEIGHTS_FILE}", cache_dir) is None:
        raise CollapseError(f"orderer: {config.parent} has a {CONFIG_FILE}, but no {WEIGHTS_FILE}")
    find_beside(cfg, f"{ORDERER_FOLDER}/{SETTINGS_FILE}", cache_dir)
    return config.parent


def bundled_models() -> list[str]:
    """Names of the models whose weights come with the package."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if folder.is_dir())


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Whatever timm, torch, safetensors or the system raise inside, as one line; a `CollapseError` passes as it is.

    Args:
        what: The argument and what was given, such as "model: 'vit_enormous'".

    Raises:
        CollapseError: "WHAT could not be loaded: WHY".
    """
    try:
        yield
    except CollapseError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AssertionError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # torch writes a line for a tensor
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise CollapseError(
            f"{what} could not be loaded: {' '.join(lines[:4]) or type(error).__name__}{more}"
        ) from error


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an exception of the Hub's client, or the cause that it wraps, came from."""
    found = [getattr(getattr(one, "response", None), "status_code", None) for one in (error, error.__cause__)]
    return next(filter(None, found), None)


def explain(error: BaseException) -> str:
    """An exception of the Hub's client in one line: what happened, behind what it says of it."""
    cause = error.__cause__ or error
    lines = [line for line in str(cause).strip().splitlines() if line and not line.startswith("(Request ID")]
    status = http_status(error)
    names = [type(error).__name__] + [type(cause).__name__] * (cause is not error)
    return f"{' from '.join(names)}{f', HTTP {status}' * bool(status)}: {lines[0] if lines else 'no message'}"


def _unavailable(repo: str, filename: str, error: Exception) -> CollapseError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        place = "the local cache (HF_HUB_OFFLINE is set)"
    else:
        place = f"{constants.ENDPOINT} and the local cache"
    return CollapseError(
        f"pretrained: {filename} of {repo!r} could not be had; looked for in {place}: {explain(error)}. Without a "
        f"download: pretrained=False, a saved folder as 'local-dir:FOLDER', or a bundled model: "
        f"{', '.join(bundled_models())}"
    )
