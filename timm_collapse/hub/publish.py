"""Publishing a model: the folder that goes to the Hub, and the way there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from timm.models._input import update_model_args
from torch import nn

from ..collapse.base import Collapsed
from ..evaluation.report import without_paths
from ..models import MAR
from ..models.registry import load_model
from ..order import CollapseError
from .card import trained_on, write_card
from .config import HubConfig
from .download import explain, http_status
from .files import CARD_FILE, CONFIG_FILE, ORDERER_FOLDER, PUBLISHED, RECIPE_FILE
from .mar_checkpoints import load_mar_weights
from .save import save_model

PATTERNS = [f"{name}/*" if name == ORDERER_FOLDER else name for name in PUBLISHED]


def load_checkpoint(config: HubConfig, checkpoint: str | Path = "") -> nn.Module:
    """The model of a configuration, with the weights of a checkpoint, in eval mode.

    Args:
        checkpoint: A folder that a train script wrote, a registered name with weights, or for a generator also a
            weight file; empty takes the configuration's own.

    Raises:
        CollapseError: There is none, or it is of another architecture.
    """
    checkpoint = str(checkpoint or config.checkpoint)
    if not checkpoint:
        raise CollapseError(f"checkpoint: {config.name} has no weights of its own; give the folder of a run. It is "
                            f"trained by: {' && '.join(config.train)}")  # fmt: skip
    if Path(checkpoint).is_file():
        model = load_model(config.architecture, "architecture", pretrained=False, **config.model_args)
        if not isinstance(model, MAR):
            raise CollapseError(f"checkpoint: only a generator can be read from a file alone, got {checkpoint!r}")
        load_mar_weights(model, checkpoint)
    elif Path(checkpoint).is_dir() or timm.is_model_pretrained(checkpoint):
        model = load_model(checkpoint, "checkpoint", **config.model_args)
    else:
        raise CollapseError(f"checkpoint: {checkpoint!r} is neither a folder, a file, nor a model with weights")
    found = model.pretrained_cfg["architecture"]
    if found != config.architecture:
        raise CollapseError(f"checkpoint: {checkpoint!r} is a {found}, {config.name} is a {config.architecture}")
    return model


def publish_folder(config: HubConfig, folder: str | Path, repo_id: str, checkpoint: str | Path = "") -> Path:
    """Write everything that goes to the Hub: what timm reads, orderer, order bank, recipe, and the card.

    Args:
        folder: Empty or missing, or what an earlier call wrote, which is replaced.
        repo_id: Where it is going to be: the card's three lines name it, and transformers finds the orderer there, on
            its main branch (timm takes it from the revision that the model is loaded from).

    Raises:
        CollapseError: As `load_checkpoint`, a generator whose VAE is a file, or a folder with other files.
    """
    folder, checkpoint = Path(folder), checkpoint or config.checkpoint
    model = load_checkpoint(config, checkpoint)
    _check_vae(getattr(model, "vae", None))
    recipe = _recipe_of(checkpoint)
    config = config if str(checkpoint) == config.checkpoint else _as_trained(config, recipe)
    _clear(folder)
    model.pretrained_cfg = {**model.pretrained_cfg, "license": config.license}
    save_model(model, folder, half=None, whole=True)
    if (folder / ORDERER_FOLDER).is_dir():
        _name_orderer(folder / CONFIG_FILE, f"hf-hub:{repo_id}/{ORDERER_FOLDER}")
        if isinstance(model, Collapsed):
            update_model_args(model, orderer=f"hf-hub:{repo_id}/{ORDERER_FOLDER}")
    if recipe:
        (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n")
    write_card(config, model, folder, repo_id, recipe)
    return folder


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder, as one commit: either all of it is there, or nothing.

    Large files go first; those that are already there are not sent again, so an interrupted upload goes on where it was
    when it is run again.

    Args:
        folder: What `publish_folder` or `save_model` wrote; recipes are sent without the paths of this machine. Other
            files in it are not sent; files of such names that it does not hold are deleted in the repository. The token
            is the one that `hf auth login` stored, or HF_TOKEN.
        repo_id: "ME/NAME"; made if there is none.
        revision: Branch, made if there is none; None for main.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CollapseError: No model in the folder, one whose VAE is a file of this machine, a bad name, no permission, or a
            connection that fails for good.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise CollapseError(f"folder: {str(folder)!r} holds no saved model ({CONFIG_FILE} is missing)")
    _check_vae(_read_json(folder / CONFIG_FILE).get("model_args", {}).get("vae"))
    api = HfApi(library_name="timm-collapse")
    with TemporaryDirectory() as outgoing:
        _collect(folder, Path(outgoing))
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=outgoing, revision=revision, commit_message="Upload model",
                create_pr=create_pr, delete_patterns=PATTERNS,
            )  # fmt: skip
        except Exception as error:  # the Hub's own, the system's, and those of whatever HTTP library it uses
            raise CollapseError(_advise(error, api.endpoint, repo_id)) from error
    return commit.pr_url or commit.commit_url


def _collect(folder: Path, outgoing: Path) -> None:
    """What of a folder is sent, in another: links to its files, and its recipes without the paths of this machine."""
    for part in (folder, folder / ORDERER_FOLDER):
        for path in part.iterdir() if part.is_dir() else ():
            if not path.is_file() or path.name not in PUBLISHED:
                continue
            target = outgoing / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if path.name == RECIPE_FILE:
                target.write_text(json.dumps(without_paths(_read_json(path)), indent=1) + "\n")
            else:
                target.symlink_to(path.resolve())


def _check_vae(vae: str | None) -> None:
    if vae and vae != "pixels" and Path(vae).expanduser().exists():
        raise CollapseError(f"vae: must be 'pixels' or a Hub id, so that others can load it, got {vae!r}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CollapseError(f"folder: {file} is damaged: {error}") from error


def _advise(error: Exception, endpoint: str, repo_id: str) -> str:
    """One line: what failed, and what to do about it."""
    from huggingface_hub.errors import HFValidationError

    if http_status(error) in (401, 403):
        advice = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
    elif isinstance(error, HFValidationError):
        advice = "a repository is named 'ME/NAME'"
    else:
        advice = "nothing of it is visible there; run the same command again, what was sent is not sent twice"
    return f"repo_id: {repo_id!r} could not be written at {endpoint} ({explain(error)}): {advice}"


def _name_orderer(config_file: Path, reference: str) -> None:
    config = json.loads(config_file.read_text())
    config["model_args"]["orderer"] = reference
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _clear(folder: Path) -> None:
    """An empty folder in the place of what an earlier call wrote, even if it was interrupted, but of nothing else."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = CARD_FILE in found and (CONFIG_FILE in found or not (folder / CARD_FILE).read_bytes())
    if found and (found - set(PUBLISHED) or not ours):
        raise CollapseError(f"folder: {str(folder)!r} holds other files; choose an empty one")
    if found:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD_FILE).touch()  # empty until the folder is whole


def _as_trained(config: HubConfig, recipe: dict[str, Any]) -> HubConfig:
    """The configuration of a checkpoint of somebody's own: what was measured with others' weights is not its.

    Data sets, summary and commands stay where it was trained on the data set that they name.
    """
    dataset = trained_on(recipe)
    named = {Path(name).name for command in config.train for name in re.findall(r"--dataset[ =](\S+)", command)}
    if not dataset or dataset in named:
        return replace(config, results=())
    return replace(
        config, results=(), datasets=(), train=(), base_model="",
        summary=f"`{config.architecture}` of timm-collapse, trained on {dataset}.",
    )  # fmt: skip


def _recipe_of(checkpoint: str | Path) -> dict[str, Any]:
    """The recipe beside a checkpoint, without the paths of the machine that it was made on."""
    path = Path(checkpoint)
    if not path.exists():  # a registered name
        cfg = timm.get_pretrained_cfg(str(checkpoint))
        path = Path(cfg.file) if cfg and cfg.file else path
    recipe = (path if path.is_dir() else path.parent) / RECIPE_FILE
    if not recipe.is_file():
        return {}
    return without_paths(_read_json(recipe))
