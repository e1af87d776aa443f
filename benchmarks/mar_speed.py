"""Images a second of `MAR.generate` beside the literal published loop, on the same weights, noise and orders.

    python benchmarks/mar_speed.py --models mar_tiny_patch4_32 --batch-size 32 --steps 16 --diffusion-steps 50
    python benchmarks/mar_speed.py --models mar_base --batch-size 32 --steps 64 --compile    # on a GPU

The literal loop is the slow reference of the tests: masks searched by nonzero, doubled diffusion states, conditions
embedded at every diffusion step, all tokens through every block. Random weights: the cost does not depend on them. The
fast sampler draws from the same distribution, except in the row with annealed diffusion steps, which approximates it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.evaluation import images_per_second
from timm_collapse.evaluation.report import markdown_table, write_section
from timm_collapse.models.mar import MAR

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
from mar_literal import literal_generate  # noqa: E402


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["mar_tiny_patch4_32"], help="registered mar_* architectures")
    add("--batch-size", type=int, default=32)
    add("--steps", type=int, default=16)
    add("--diffusion-steps", type=int, default=50)
    add("--guidance-scale", type=float, default=3.0)
    add("--runs", type=int, default=3)
    add("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    add("--compile", action="store_true", help="also the fast sampler with its diffusion loop compiled")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, data = [], {}
    for name in args.models:
        mar = timm.create_model(name, num_sampling_steps=args.diffusion_steps, latent_bound=0.0).eval().to(device)
        plan = make_plan(mar, args.batch_size, args.steps, args.guidance_scale)
        calls = samplers(mar, plan)
        annealed = (args.diffusion_steps, max(2, args.diffusion_steps // 5))
        calls[f"fast, diffusion steps {annealed[0]} to {annealed[1]}"] = lambda mar=mar, plan=plan, annealed=annealed: (
            mar.generate(*plan, torch.Generator(device), diffusion_steps=annealed)
        )
        if args.compile:
            compiled = timm.create_model(name, num_sampling_steps=args.diffusion_steps, latent_bound=0.0)
            compiled = compiled.eval().to(device).compile_sampler()
            calls["fast, compiled"] = lambda mar=compiled, plan=plan: mar.generate(*plan, torch.Generator(device))
        for precision in args.precisions:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                found = images_per_second(calls, args.batch_size, args.runs)
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            data[f"{name} {precision}"] = {**found, "peak_memory_gib": memory}
            rows += [{"model": name, "precision": precision, "sampler": sampler, "images/s": f"{speed:.3g}",
                      "ratio": f"{speed / found['literal']:.2f}"} for sampler, speed in found.items()]  # fmt: skip
    setting = f"{args.steps} steps, {args.diffusion_steps} diffusion steps, guidance {args.guidance_scale:g}"
    text = f"Batch {args.batch_size}, {setting}, {device.type}, median of {args.runs} runs in turn.\n\n"
    text += markdown_table(rows)
    if device.type == "cuda":
        text += f"\n\nPeak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB."
    write_section(f"mar_speed_{device.type}", f"Speed of generation ({device.type})", text, data)
    print(text)


def make_plan(mar: MAR, batch_size: int, steps: int, guidance_scale: float) -> tuple[Any, ...]:
    """What both samplers are given, but for the generator: labels, steps, guidance, temperature 1, orders, noise."""
    device = mar.fake_latent.device
    labels = torch.arange(batch_size, device=device) % mar.num_classes
    order = torch.rand(batch_size, mar.seq_len, device=device).argsort(1)
    noise = torch.randn(batch_size, mar.seq_len, mar.token_dim, device=device)
    return labels, steps, guidance_scale, "linear", 1.0, order, noise


def samplers(mar: MAR, plan: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
    """A call of the literal loop and one of the fast sampler."""
    device = mar.fake_latent.device
    return {
        "literal": lambda: literal_generate(mar, *plan, torch.Generator(device)),
        "fast": lambda: mar.generate(*plan, torch.Generator(device)),
    }


if __name__ == "__main__":
    main()
