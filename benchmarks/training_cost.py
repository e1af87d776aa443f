"""What training a model costs: the dry runs of the train scripts, side by side.

    python benchmarks/training_cost.py --name cpu

Nothing is downloaded and nothing is trained: weights and latents are random.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

from timm_collapse.evaluation.report import markdown_table, write_section

RUNS = {
    "cvit_small_patch16": "train/cvit.py --model cvit_small_patch16 --keep_schedule 0.22",
    "cvit_small_patch16, all patches": "train/cvit.py --model cvit_small_patch16 --keep_schedule full",
    "cvit_base_patch16": "train/cvit.py --model cvit_base_patch16 --keep_schedule 0.22",
    "cvit_base_patch16, all patches": "train/cvit.py --model cvit_base_patch16 --keep_schedule full",
    "cmar_tiny_patch4_32": "train/cmar.py --model cmar_tiny_patch4_32",
    "cmar_base": "train/cmar.py --model cmar_base",
    "cmar_large": "train/cmar.py --model cmar_large",
    "cmar_huge": "train/cmar.py --model cmar_huge",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the section in docs/results.md: the hardware")
    parser.add_argument("--models", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    reports = {name: dry_run(RUNS[name], args) for name in args.models}
    text = (
        f"A training step as `--dry_run true` measures it: {args.batch_size} images a process, precision "
        f"{args.precision}, one process. State: weights, gradients, AdamW's moments and the moving average, which "
        "FSDP2 shares among the processes; activations: what a step keeps for the backward pass, an image (on a CPU "
        "with the attention matrices). MACs: one forward pass, orderer included.\n\n" + markdown_table(rows(reports))
    )
    write_section(f"training_cost_{args.name}", f"Cost of training ({args.name})", text, {"runs": reports})


def dry_run(command: str, args: argparse.Namespace) -> dict:
    """The report of one dry run, in a process of its own."""
    shared = ["--dataset", "digits", "--dry_run", "true", "--batch_size", str(args.batch_size)]
    line = [sys.executable, *shlex.split(command), *shared, "--precision", args.precision]
    found = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def rows(reports: dict[str, dict]) -> list[dict[str, str]]:
    """The table."""

    def gib(number: float) -> str:
        return f"{number / 2**30:.2f} GiB"

    return [
        {
            "model": name,
            "parameters": f"{one['parameters_trained'] / 1e6:.1f} M",
            "GMACs/image": f"{one['macs_per_image'] / 1e9:.2f}",
            "state": gib(sum(one["memory_bytes"][part] for part in ("weights", "gradients", "optimizer", "ema"))),
            "activations/image": gib(one["memory_bytes"]["activations"] / one["images_per_step"]),
            "images/s": f"{one['images_per_second']:.3g}",
        }
        for name, one in reports.items()
    ]


if __name__ == "__main__":
    main()
