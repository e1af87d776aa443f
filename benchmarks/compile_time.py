"""Compiled, exported and traced: seconds to the first answer, and how near it is to the eager one.

python benchmarks/compile_time.py
python benchmarks/compile_time.py --models cvit_tiny_patch16 --results /dev/shm/results.md  # to try
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse.evaluation.cost import clock
from timm_collapse.evaluation.report import RESULTS, markdown_table, write_section


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cvit_base_patch16", "cvit_small_patch16", "cvit_tiny_patch16"])
    parser.add_argument("--keep", type=float, default=0.5, help="what the compiled model is changed to afterwards")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page (default: %(default)s)")
    return parser.parse_args()


def compile_plain(name: str, images: Tensor) -> tuple[Tensor, float]:
    """First answer of the compiled plain model, and its seconds."""
    model = timm.create_model(name.replace("cvit_", "vit_") + "_224").eval()
    return clock(lambda: torch.compile(model, fullgraph=True)(images))


def export_onnx(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The model in ONNX Runtime, for any batch size."""
    import onnxruntime

    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (images,), dynamo=True, verbose=False, dynamic_shapes=shapes).save(path)
        session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def export(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},)
    ).module()


def trace(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, images, check_trace=False)


@torch.no_grad()
def main() -> None:
    args = parse()
    rows, data = [], {}
    for name in args.models:
        torch.manual_seed(0)
        images, fewer = (torch.randn(count, 3, 224, 224) for count in (args.batch_size, 3))
        model = timm.create_model(name).eval()
        start = model.keep
        torch.compiler.reset()
        _, plain = clock(lambda name=name, images=images: compile_plain(name, images))
        compiled = torch.compile(model, fullgraph=True)
        answer, first = clock(lambda compiled=compiled, images=images: compiled(images))
        far = [float((answer - model(images)).abs().max())]
        model.keep = args.keep
        answer, again = clock(lambda compiled=compiled, images=images: compiled(images))
        far.append(float((answer - model(images)).abs().max()))
        model.keep = start
        found = {"plain, compiled": plain, "compiled": first, f"then keep {args.keep:g}": again}
        for way, make in (("torch.export", export), ("ONNX", export_onnx), ("jit.trace", trace)):
            call, found[way] = clock(lambda make=make, model=model, images=images: make(model, images))
            far.append(float((call(fewer) - model(fewer)).abs().max()))  # another batch size than it was made with
        rows.append({"model": name, **{way: f"{taken:.0f} s" for way, taken in found.items()},
                     "largest difference": f"{max(far):.1e}"})  # fmt: skip
        data[name] = {"seconds": found, "largest_difference": max(far)}
        print(rows[-1], flush=True)
    text = (
        f"Seconds to the first answer on {args.batch_size} images of 224 px, by inductor with fullgraph=True (plain: "
        "the same ViT that sees all patches), then at another keep; seconds to make a program of any batch size; and "
        "the largest difference of logits from the eager model, over all of these. The orderer is part of each."
        f"\n\n{markdown_table(rows)}"
    )
    write_section("compile_time", "Compiled and exported", text, data, args.results)


if __name__ == "__main__":
    main()
