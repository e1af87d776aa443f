"""Prefill of vision-language models with fewer image tokens: time, its parts, MACs and memory, order counted.

python benchmarks/vlm_speed.py                              # shapes of SmolVLM-256M and Qwen3-VL-2B, as deep as fits
python benchmarks/vlm_speed.py --models smolvlm_256m --layers 2 --runs 1 --results /dev/shm/results.md  # to try
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import nn
from tqdm.auto import tqdm

from timm_collapse import collapse
from timm_collapse.evaluation import count_macs
from timm_collapse.evaluation.report import RESULTS, markdown_table, write_section

TEXT_TOKENS = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="random weights")
    parser.add_argument("--layers", type=int, default=0, help="of the language model; 0: the number that the docs name")
    parser.add_argument("--keeps", type=float, nargs="+", default=[1.0, 0.5, 0.22, 0.1])
    parser.add_argument("--orderer", default="collapse_ranker_tiny_224")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="", help="float32, bfloat16 (default: bfloat16 on a GPU)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each, in turn; the median counts")
    parser.add_argument("--name", default="vlm_speed", help="section of the results page and name of the JSON file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page (default: %(default)s)")
    return parser.parse_args()


def smolvlm_256m(layers: int, batch: int):
    """SigLIP-B/16 at 512 px, five tiles of 64 tokens each, and SmolLM2-135M."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "num_hidden_layers": layers or 30, "vocab_size": 49280,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    config = SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=4, image_token_id=49190)
    inputs = {"pixel_values": torch.randn(batch, 5, 3, 512, 512)}
    return SmolVLMForConditionalGeneration._from_config(config), prompt(inputs, 49190, 5 * 64, batch)


def qwen3_vl_2b(layers: int, batch: int):
    """Its tower (24 blocks) on 768 x 768 px, 576 tokens, and 4 of the language model's 28 layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "num_hidden_layers": layers or 4, "vocab_size": 32000, "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            }}  # fmt: skip
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "patch_size": 16,
              "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=31000, video_token_id=31001,
                           vision_start_token_id=31002, vision_end_token_id=31003)  # fmt: skip
    inputs = {
        "pixel_values": torch.randn(batch * 48 * 48, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, 48, 48]] * batch),
    }
    inputs = prompt(inputs, 31000, 576, batch)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 31000).int()
    return Qwen3VLForConditionalGeneration._from_config(config), inputs


MODELS = {"smolvlm_256m": smolvlm_256m, "qwen3_vl_2b": qwen3_vl_2b}


def prompt(inputs: dict, token: int, count: int, batch: int) -> dict:
    """The image's placeholders, then words."""
    words = torch.randint(3, 1000, (batch, TEXT_TOKENS))
    ids = torch.cat([torch.full((batch, count), token), words], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def clock(parts: dict[str, nn.Module], device: torch.device):
    """Seconds that each module takes inside; yields name -> seconds, filled on the way."""
    seconds, began = defaultdict(float), {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with ExitStack() as stack:
        for name, module in parts.items():

            def before(*_, name=name):
                began[name] = now()

            def after(*_, name=name):
                seconds[name] += now() - began[name]

            for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
                stack.callback(handle.remove)
        start = now()
        yield seconds
        seconds["all"] = now() - start


@torch.no_grad()
def measure(model: nn.Module, inputs: dict, keeps: list[float], runs: int, device: torch.device) -> list[dict]:
    """One row a keep."""
    core = model.model
    tower = getattr(core, "vision_model", None) or core.visual
    language = getattr(core, "text_model", None) or core.language_model
    inner = tower.encoder if hasattr(tower, "encoder") else tower  # the tiles' embeddings are not the tower's blocks
    parts = {"order": model.orderer, "tower": inner, "language model": language}
    found, rows = {keep: [] for keep in keeps}, []
    for run in tqdm(range(runs + 1), desc="runs", leave=False):
        for keep in keeps:
            model.keep = keep
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with clock(parts, device) as seconds:
                model(**inputs, logits_to_keep=1)
            if run:  # the first warms up
                found[keep].append(dict(seconds))
            if device.type == "cuda":
                found[keep][-1:] = [
                    {**one, "memory": torch.cuda.max_memory_allocated(device)} for one in found[keep][-1:]
                ]
    whole = median(one["all"] for one in found[keeps[0]])
    for keep in keeps:
        model.keep = keep
        tokens = inputs["input_ids"].shape[1]
        if keep != 1:
            kept = model.compute_kept(inputs)
            tokens -= (sum(kept.counts) - sum(len(cells) for cells in kept.cells)) // len(inputs["input_ids"])
        took = {name: median(one.get(name, 0.0) for one in found[keep]) for name in ("all", *parts)}
        macs = count_macs(lambda: model(**inputs, logits_to_keep=1)) / len(inputs["input_ids"])
        row = {
            "keep": keep,
            "tokens": tokens,
            "gmacs": macs / 1e9,
            "seconds": took["all"],
            "times": whole / took["all"],
        }
        row |= {f"{name} share": took[name] / took["all"] for name in parts}
        if device.type == "cuda":
            row["peak_gib"] = max(one["memory"] for one in found[keep]) / 2**30
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    shown = []
    for row in rows:
        line = {
            "keep": f"{row['keep']:g}" + (" (stock)" if row["keep"] == 1 else ""),
            "tokens in the language model": row["tokens"],
            "GMACs": f"{row['gmacs']:.1f}",
            "prefill, s": f"{row['seconds']:.3f}",
            "times stock": f"{row['times']:.2f}",
        }
        line |= {f"{name}": f"{row[f'{name} share']:.0%}" for name in ("order", "tower", "language model")}
        if "peak_gib" in row:
            line["peak memory, GiB"] = f"{row['peak_gib']:.2f}"
        shown.append(line)
    return markdown_table(shown)


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    tables, data = [], {}
    keeps = sorted({1.0, *args.keeps}, reverse=True)
    for name in args.models:
        torch.manual_seed(0)
        model, inputs = MODELS[name](args.layers, args.batch_size)
        model = collapse(model.eval().to(device, dtype), args.orderer, keep=1)
        inputs = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}
        rows = measure(model, inputs, keeps, args.runs, device)
        tables.append(f"**{name}**: {MODELS[name].__doc__}\n\n{table(rows)}")
        print(tables[-1], end="\n\n", flush=True)
        data[name] = rows
    text = (
        f"Prefill of one prompt of {TEXT_TOKENS} words and one picture, batch {args.batch_size}, {device.type} "
        f"{str(dtype).removeprefix('torch.')}, random weights; order by {args.orderer}, counted; median of {args.runs} "
        "runs in turn. Shares are of the prefill's time; what is missing to 100% is embeddings and the drop "
        "itself.\n\n" + "\n\n".join(tables)
    )
    write_section(args.name, "Prefill of vision-language models", text, data, args.results)


if __name__ == "__main__":
    main()
