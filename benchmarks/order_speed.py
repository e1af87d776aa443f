"""Cost of the orderers: multiply-accumulates, launches, and images a second beside a ViT-B/16 in the same run.

python benchmarks/order_speed.py --batch-size 16
"""

from __future__ import annotations

import argparse

import timm
import torch

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.evaluation import count_launches, count_macs, images_per_second
from timm_collapse.evaluation.report import markdown_table, write_section


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small, large = (
        torch.randn(args.batch_size, 3, 64, 64, device=device),
        torch.randn(args.batch_size, 3, 224, 224, device=device),
    )
    ranker, photo_ranker, nano_ranker, cells_ranker, rerun_ranker, comae, photo_comae, vit = (
        timm.create_model(name, **kwargs).eval().to(device)
        for name, kwargs in (
            ("collapse_ranker_tiny", {}),
            ("collapse_ranker_tiny_224", {}),
            ("collapse_ranker_nano_224", {}),
            ("collapse_ranker_cells_224", {}),
            ("collapse_ranker_tiny_224_rerun", {}),
            ("comae_tiny", {}),
            ("comae_tiny", {"img_size": 224, "patch_size": 16}),
            ("vit_base_patch16_224", {}),
        )
    )
    precision = torch.float32
    exact_name = "comae_tiny's sizes at 224 px, 14 x 14 patches (196 passes)"
    calls = {
        "collapse_ranker_tiny, 64 px, first 22%": lambda x=small: ranker.rank(x, upto=14),
        "collapse_ranker_tiny, 64 px, whole order": lambda x=small: ranker.rank(x),
        "comae_tiny, 64 px (64 encoder passes)": lambda x=small: comae.dependency(x, precision=precision),
        "collapse_ranker_tiny_224, first 22%": lambda x=large: photo_ranker.rank(x, upto=43),
        "collapse_ranker_nano_224, first 22%": lambda x=large: nano_ranker.rank(x, upto=43),
        "collapse_ranker_cells_224": lambda x=large: cells_ranker.rank(x),
        "collapse_ranker_tiny_224_rerun, first 22%": lambda x=large: rerun_ranker.rank(x, upto=43),
        "collapse_ranker_tiny_224, whole order": lambda x=large: photo_ranker.rank(x),
        exact_name: lambda x=large: photo_comae.dependency(x, precision=precision),
        "vit_base_patch16_224": lambda x=large: vit(x),
    }
    macs = {name: count_macs(call) / args.batch_size for name, call in calls.items()}
    launches = {name: count_launches(call) for name, call in calls.items()}
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast(device, precision, enabled=precision is not torch.float32):
            found[precision] = images_per_second(calls, args.batch_size, args.runs)
    rows = [{"model": name, "GMACs an image": f"{macs[name] / 1e9:.3f}", "launches": launches[name],
             "images/s fp32": f"{found[torch.float32][name]:.1f}",
             "images/s bf16": f"{found[torch.bfloat16][name]:.1f}"} for name in calls]  # fmt: skip
    exact, cheap = exact_name, "collapse_ranker_tiny_224, first 22%"
    ratio = found[torch.float32][cheap] / found[torch.float32][exact]
    text = (f"Batch {args.batch_size}, {device}, median of {args.runs} runs in turn, pre-processing excluded, random "
            "weights (the cost does not depend on them). Launches: calls of operations that compute, whatever the "
            f"batch; on a GPU each is at least one kernel.\n\n{markdown_table(rows)}\n\nRatio of ranker "
            f"(first 22%) to exact CoMAE at 224 px, fp32: {ratio:.0f}x.")  # fmt: skip
    data = {"macs": macs, "launches": launches, **{str(k): v for k, v in found.items()}}
    write_section("order_speed", "Cost of the orderers", text, data)
    print(text)


if __name__ == "__main__":
    main()
