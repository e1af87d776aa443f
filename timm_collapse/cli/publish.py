"""`timm-collapse publish`: a trained model, with all that belongs to it, to the Hugging Face Hub.

What is heavy is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

SUMMARY = "a trained model, its orderer and its card to the Hub"
DESCRIPTION = (
    "Writes what timm reads (config.json, model.safetensors), the orderer and the order bank beside it, and a model "
    "card with a measured table, a picture and the training command; then uploads the folder as one commit. Needs a "
    "token of the Hub: `hf auth login`, or HF_TOKEN. An interrupted upload goes on when the command is run again."
)
EXAMPLE = """timm-collapse publish hub_configs/cvit_tiny_patch4_32.json --checkpoint runs/cvit --repo-id ME/my-cvit

  only the folder, nothing is sent:
  timm-collapse publish hub_configs/cvit_tiny_patch4_32.json --repo-id ME/my-cvit --dry-run --output runs/publish"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `publish`."""
    add = parser.add_argument
    # fmt: off
    add("config", metavar="CONFIG",
        help="a file of hub_configs/: what the model is, and how it is trained; or the name of a collapsed model of "
        "timm, such as cvit_base_patch16")
    add("--repo-id", required=True, metavar="ME/NAME", help="repository, made if there is none")
    add("--checkpoint", default="", metavar="RUN",
        help="folder that a train script wrote; for a generator also a weight file (default: the bundled weights, "
        "where there are any)")
    add("--output", metavar="FOLDER",
        help="keep what is uploaded in this folder (with --dry-run, default: runs/publish)")
    add("--dry-run", action="store_true", help="write the folder only; nothing is sent")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", metavar="BRANCH", help="upload to this branch, made if there is none (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of writing to the branch")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Writes the folder and uploads it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from ..hub.config import read_config
    from ..hub.publish import publish_folder, push
    from ..order import CollapseError

    try:
        validate_repo_id(args.repo_id)
        if args.repo_id.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise CollapseError(f"--repo-id: must be ME/NAME, got {args.repo_id!r}: {error}") from error
    config = read_config(args.config)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or ("runs/publish" if args.dry_run else temporary))
        folder = publish_folder(config, output, args.repo_id, args.checkpoint.removeprefix("local-dir:"))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        if args.dry_run:
            print(f"{folder}: {size:.1f} MB, nothing was sent")
            return
        # the token is the stored one, or HF_TOKEN
        address = push(folder, args.repo_id, args.private, args.revision, create_pr=args.create_pr)
        print(f"{address} ({size:.1f} MB)")
