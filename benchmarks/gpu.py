"""What the order is worth on a GPU: everything in one command of at most ten minutes, with nothing downloaded.

    python benchmarks/gpu.py --output runs/gpu --train-data data/tiny-imagenet-100
    python benchmarks/gpu.py --output runs/gpu --parts compile --minutes compile=6    # one part again, with more time
    python benchmarks/gpu.py --output runs/gpu --parts                               # only write the section anew
    python benchmarks/gpu.py --output runs/gpu_tiny --tiny --results runs/gpu_tiny/results.md    # any CPU, two minutes

The parts, and what each of them measures, in bf16 with random weights, where nothing else is said:

- speed: ViT-B, S and Ti (patch 16, 224 px) plain, collapsed at keep .22 and .5 by the orderer that each `cvit_*` takes
  by default (the order is part of the time), with an order that was made before (the ideal: an order for nothing), and
  with token merging at the multiply-accumulates of the collapsed model, order included. Images a second at batch 1, 8,
  64 and 256, as they are called (eager) and as CUDA graphs; the working memory of a pass, beside weights and images;
  multiply-accumulates; launches: operations that compute, and the kernels that the profiler sees, at batch 8.
- order: the orderers alone, up to 22%, to 50% and to the end of the order, in the same way.
- compile: `torch.compile`, fullgraph, with and without its CUDA graphs (mode reduce-overhead): seconds to the first
  answer and to the first one at another keep, new graphs, the largest relative difference of an image's logits from
  eager mode (another order changes them wholly), images a second beside eager mode.
- mar: `mar_base` at 256 px, 64 steps of 100 diffusion steps, guidance 3: the literal published loop and ours, autocast.
- long: 50,176 patches of one pixel (`cvit_base_patch1`), forward and a training step with gradient checkpointing.
- train: a ViT-Ti/8 for 64 px trained with random drop on `--train-data` for `--train-minutes`, decoding and measuring
  included; its weights (bf16, a folder for `timm.create_model("local-dir:...", pretrained=True)`) are written to the
  output folder, with top-1 on the validation split at keep 1, .5 and .22 for random and Bayer orders.

Times are medians after a warm-up, from synchronisation to synchronisation; whatever is compared with each other is
timed in turn, in one process. Every part has its minutes (`--minutes PART=MINUTES`); what does not fit is skipped and
named. Each task is a process of its own: what fails, hangs or runs out of memory is recorded, and the next one starts.
After every measurement the output folder's `measured.json` is whole, after every task the section of the results page.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from gpu_models import TINY, Size, about
from gpu_parts import tasks
from gpu_report import section
from gpu_runner import GRACE, Box, Record, Task, run_part
from gpu_train import train

from timm_collapse import CollapseError
from timm_collapse.evaluation.report import RESULTS, relative_paths, write_section

PARTS = ("speed", "order", "compile", "mar", "long", "train")
MINUTES = {"speed": 1.1, "order": 0.25, "compile": 1.4, "mar": 0.65, "long": 0.4}
TINY_MINUTES = {"speed": 0.2, "order": 0.1, "compile": 0.4, "mar": 0.1, "long": 0.1}
FILE = "measured.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help=f"folder of {FILE} and of the trained weights")
    add("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="in this order; none: only write the section")
    add("--minutes", nargs="*", default=[], metavar="PART=MINUTES", help="time of a part, instead of its default")
    add("--train-minutes", type=float, default=None, help="time of the part train (default: 5, with --tiny 0.4)")
    add("--total-minutes", type=float, default=9.4, help="no part goes on after that (default: %(default)s)")
    add("--train-data", default="", help="a data set with a training and a validation split, such as a folder of "
        "parquet files (default: none, with --tiny digits)")  # fmt: skip
    add("--tiny", action="store_true", help="small models, few steps: to try the command, on a CPU, too")
    add("--name", default="gpu", help="of the section and of its JSON file beside the page")
    add("--results", type=Path, default=RESULTS, help="the page (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.minutes = minutes(args.minutes, TINY_MINUTES if args.tiny else MINUTES)
    args.minutes["train"] = args.train_minutes or (0.4 if args.tiny else 5.0)
    args.train_data = args.train_data or ("digits" if args.tiny else "")
    if "train" in args.parts and not args.train_data:
        raise CollapseError("train_data: a data set is needed for the part train, got none; or name other --parts")
    return args


def minutes(given: list[str], defaults: dict[str, float]) -> dict[str, float]:
    """Part -> minutes, from texts such as "mar=0.5"."""
    found = dict(defaults)
    for text in given:
        part, _, number = text.partition("=")
        try:
            found[part] = float(number)
        except ValueError:
            found[part] = 0.0
        if part not in defaults or not 0 < found[part] < float("inf"):
            raise CollapseError(f"minutes: must be PART=MINUTES with one of {', '.join(defaults)}, got {text!r}")
    return found


def main() -> None:
    args = parse()
    size, total = TINY if args.tiny else Size(), Box(60 * args.total_minutes)
    record = Record(args.output / FILE)
    if args.parts:
        run_part(record, "about", [Task("about", about)], total.inner(60))
        record.data["command"] = shlex.join(["python", *(relative_paths(argument) for argument in sys.argv)])
    for part in args.parts:
        if part == "train":
            reserve = 4.0 if args.tiny else 12.0
            work = [Task("train", partial(train, args.train_data, args.output, size, reserve=reserve))]
        else:
            work = tasks(part, size, record.data["about"].get("gpu", False))
        run_part(record, part, work, total.inner(60 * args.minutes[part]), grace=GRACE / 3 if args.tiny else GRACE)
        record.part(part)["hardware"] = record.data["about"].get("hardware", "unknown")
        record.save()
        write(record, args)
        print(f"{part}: {record.part(part)['seconds']} s, {total.left:.0f} s left", flush=True)
    write(record, args)
    print(section(record.data))


def write(record: Record, args: argparse.Namespace) -> None:
    """The section of the results page; the machine that it names is that of the measurements."""
    facts = {name: record.data["about"].get(name, "unknown") for name in ("hardware", "torch")}
    write_section(
        args.name, f"Everything at once ({args.name})", section(record.data), facts | record.data, args.results
    )


if __name__ == "__main__":
    main()
