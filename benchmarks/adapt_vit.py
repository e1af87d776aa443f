"""A pretrained ViT adapted to fewer tokens for a few minutes: collapsed in several ways, or on smaller images.

    python benchmarks/adapt_vit.py --name caltech101 --model local-dir:runs/real_vit --blocks 11 \
        --dataset data/caltech101 --variants downscaled:2 collapse:2 random:2 bayer:2 none:1

Each variant is a run of train/cvit.py with the same steps, images and augmentation, from the same classifier: the
pretrained ViT with a linear probe on whole training images. Runs that are cut off go on, finished ones stay in
docs/adapt_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from tqdm.auto import tqdm
from vit_probe import add_source, first_blocks, linear_probe

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseError, collapse
from timm_collapse.collapse import default_orderer
from timm_collapse.data import eval_transform, open_dataset
from timm_collapse.evaluation import accuracy_curves, image_batches
from timm_collapse.evaluation.cost import autocast
from timm_collapse.evaluation.report import markdown_table, write_section

SCRIPT = Path(__file__).parents[1] / "train" / "cvit.py"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser, images=0)
    parser.add_argument("--probe", type=int, default=1000, help="evenly spaced training images for the classifier")
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--variants", nargs="+", default=["downscaled:2", "collapse:2", "random:2", "bayer:2", "none:1"],
        help="NAME:SEEDS; downscaled, biased (downscaled, with the area bias), zoom, mild_zoom, split, none, whole "
        "(trained on all patches), collapse (--rest), sized (that, with a size embedding), sizes, zoom_sizes, "
        "random_sizes and downscaled_sizes (only a size embedding is trained, without labels), or a baseline or "
        "orderer for its order",
    )  # fmt: skip
    parser.add_argument(
        "--seen-as", nargs="*", default=[], help="variants: what the first seed of each makes of their tokens, too"
    )
    parser.add_argument("--rest", default="--remainder split --area_bias 0.5", help="of collapse and the baselines")
    parser.add_argument(
        "--recipe", default="--batch_size 32 --lr 1e-4 --warmup 0.1 --layer_decay 0.75 --freeze 5 --ema 0",
        help="arguments of train/cvit.py for all variants",
    )  # fmt: skip
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--runs", default="runs/adapt", help="folder of the trainings")
    parser.add_argument("--time", action="store_true", help="time a step of each variant: three steps, of which two")
    parser.add_argument("--note", default="", help="text under the table")
    return parser.parse_args()


def variant_arguments(name: str, rest: str) -> str:
    """Arguments of train/cvit.py that make a variant."""
    known = {
        "downscaled": "--remainder coarse --coarse_share 1",
        "biased": "--remainder coarse --coarse_share 1 --area_bias 0.5",
        "zoom": "--remainder zoom --area_bias 0.5",
        "mild_zoom": "--remainder zoom --coarse_share 0.75 --area_bias 0.5",
        "split": "--remainder split --area_bias 0.5",
        "sizes": f"{rest} --tune sizes",
        "downscaled_sizes": "--remainder coarse --coarse_share 1 --area_bias 0.5 --tune sizes",
        "zoom_sizes": "--remainder zoom --area_bias 0.5 --tune sizes",
        "random_sizes": f"--orderer random {rest} --tune sizes",
        "sized": f"{rest} --size_embed true",
        "none": "--remainder none",
        "whole": f"--keep_schedule full {rest}",
        "collapse": rest,
    }
    return known.get(name, f"--orderer {name} {rest}")


class Bench:
    """The data, the classifier that all start from, and what is known already."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.store = args, Path("docs") / f"adapt_{args.name}.json"
        self.folder = Path(args.runs) / args.name
        self.question = {"model": args.model.split("/")[-1], "blocks": args.blocks, "img_size": args.img_size,
                         "dataset": Path(args.dataset).name, "split": args.split, "images": args.images,
                         "probe": args.probe, "budgets": args.budgets, "steps": args.steps, "recipe": args.recipe,
                         "rest": args.rest, "precision": args.precision}  # fmt: skip
        found = json.loads(self.store.read_text()) if self.store.exists() else {}
        self.found = found["found"] if found.get("question") == self.question else {}

    @property
    def start(self) -> Path:
        """Folder of the classifier, made where it is missing."""
        folder = self.folder / "start"
        if not (folder / "model.safetensors").exists():
            vit = first_blocks(self.args.model, self.args.img_size, self.args.blocks, num_classes=0)
            info = open_dataset(self.args.dataset, "train", labelled=True)
            batches, features, labels = image_batches(info.dataset, self.transform(vit), self.args.probe), [], []
            with torch.no_grad(), autocast(torch.device("cpu"), self.args.precision):
                for images, truth in tqdm(batches, desc="whole images"):
                    features.append(vit(images).float())
                    labels.append(truth)
            vit.reset_classifier(info.num_classes)
            vit.head = linear_probe(torch.cat(features), torch.cat(labels), info.num_classes)
            shape = {"img_size": self.args.img_size, "depth": len(vit.blocks)}
            save_for_hf(vit, str(folder), model_args=shape, safe_serialization=True)
        return folder

    def transform(self, vit):
        return eval_transform(self.args.img_size, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])

    def command(self, variant: str, seed: int) -> list[str]:
        """Of a training."""
        args, budgets = self.args, ",".join(map(str, self.args.budgets))
        return [
            *("--model", f"local-dir:{self.start}", "--pretrained", "true", "--dataset", args.dataset),
            *("--steps", str(args.steps), "--seed", str(seed), "--precision", args.precision, "--val_split", ""),
            *("--keep", str(args.budgets[0]), "--keep_schedule", budgets, "--tensorboard", "false"),
            *shlex.split(args.recipe), *shlex.split(variant_arguments(variant, args.rest)),
            *("--output", str(self.folder / f"{variant}_{seed}")),
        ]  # fmt: skip

    def train(self, variant: str, seed: int, *more: str) -> str:
        """Run it to its end; returns what it printed."""
        command = [sys.executable, str(SCRIPT), *self.command(variant, seed), *more]
        environment = {"ACCELERATE_USE_CPU": "true"} if not torch.cuda.is_available() else {}
        done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise CollapseError(f"variants: the training of {variant} ended with status {done.returncode}")
        return done.stdout

    def top1(self, model, budgets: list[int], whole: bool = True) -> dict[str, dict[str, float]]:
        """Tokens, or "whole" -> top-1 in per cent and its standard error."""
        dataset = open_dataset(self.args.dataset, self.args.split, labelled=True).dataset
        patches = model.patch_embed.num_patches
        keeps = {budget / patches: str(budget) for budget in budgets} | ({1.0: "whole"} if whole else {})
        batches = image_batches(dataset, self.transform(model), self.args.images)
        curve = accuracy_curves({"it": model.eval()}, batches, sorted(keeps), self.args.precision)["it"]
        values = zip(curve.keeps, curve.top1, curve.top1_error)
        return {keeps[keep]: {"top1": value, "error": error} for keep, value, error in values}

    def measure(self) -> None:
        """Whatever is not known yet, the seeds in turn."""
        budgets = self.args.budgets
        wanted = [(name, int(seeds)) for name, _, seeds in (spec.partition(":") for spec in self.args.variants)]
        if "start" not in self.found:
            plain = collapse(timm.create_model(f"local-dir:{self.start}", pretrained=True), "bayer")
            self.keep("start", self.top1(plain, []))
        for seed in range(max(seeds for _, seeds in wanted)):
            for variant in [name for name, seeds in wanted if seed < seeds]:
                if not seed and f"{variant}|before" not in self.found:
                    start = timm.create_model(f"local-dir:{self.start}", pretrained=True)
                    self.keep(f"{variant}|before", self.top1(self.collapsed(start, variant), budgets, whole=False))
                if f"{variant}|{seed}" not in self.found:
                    self.train(variant, seed)
                    folder = self.folder / f"{variant}_{seed}"
                    trained = timm.create_model(f"local-dir:{folder}", pretrained=True)
                    self.keep(f"{variant}|{seed}", self.top1(trained, budgets))
        for variant, _ in wanted:
            for other in self.args.seen_as:
                if f"{variant}|as {other}" not in self.found:
                    trained = timm.create_model(f"local-dir:{self.folder / f'{variant}_0'}", pretrained=True)
                    seen = self.collapsed(trained, other)
                    self.keep(f"{variant}|as {other}", self.top1(seen, budgets, whole=False))
        if self.args.time:
            for variant, _ in wanted:
                cost = json.loads(self.train(variant, 0, "--dry_run", "true"))
                self.keep(f"{variant}|step", {"seconds": cost["seconds_per_step"], "macs": cost["macs_per_image"]})

    def collapsed(self, vit, variant: str):
        """A ViT, collapsed as a variant is."""
        parser = argparse.ArgumentParser()
        for name, default in (("orderer", ""), ("remainder", "none"), ("keep_schedule", "")):
            parser.add_argument(f"--{name}", default=default)
        for name, default in (("coarse_share", 0.5), ("area_bias", 0.0)):
            parser.add_argument(f"--{name}", type=float, default=default)
        how, _ = parser.parse_known_args(shlex.split(variant_arguments(variant, self.args.rest)))
        torch.manual_seed(0)
        settings = {"remainder": how.remainder, "coarse_share": how.coarse_share, "area_bias": how.area_bias}
        return collapse(vit, how.orderer or default_orderer(how.remainder), **settings)

    def keep(self, key: str, value: dict) -> None:
        """Remember what was measured, on disk too."""
        self.found[key] = value
        self.store.parent.mkdir(exist_ok=True)
        self.store.write_text(json.dumps({"question": self.question, "found": self.found}, indent=1) + "\n")


def rows_of(found: dict[str, dict]) -> list[dict[str, str]]:
    """A row for each variant, best first at the first budget: top-1 before -> after, mean of the seeds."""
    rows = []
    for variant in dict.fromkeys(key.split("|")[0] for key in found):
        seeds = [value for key, value in found.items() if key.split("|")[0] == variant and key.split("|")[-1].isdigit()]
        if not seeds:
            continue
        row = {"variant": variant, "seeds": str(len(seeds))}
        for column, start in (found[f"{variant}|before"] | found["start"]).items():
            after = [seed[column]["top1"] for seed in seeds]
            spread = f" ± {(max(after) - min(after)) / 2:.1f}" if len(after) > 1 else ""
            name = column if column == "whole" else f"{column} tokens"
            row[name] = f"{start['top1']:.1f} -> {sum(after) / len(after):.1f}{spread}"
        if any(key.endswith("|step") for key in found):
            step = found.get(f"{variant}|step")
            row["seconds a step"] = "" if step is None else f"{step['seconds']:.2f}"
        rows.append(row)
    return sorted(rows, key=lambda row: -float(row[next(k for k in row if "tokens" in k)].split("-> ")[1].split()[0]))


def crossed_rows(found: dict[str, dict]) -> list[dict[str, str]]:
    """A row for each trained variant: its top-1 on the tokens of others, at each budget."""
    pairs = [key.split("|as ") for key in found if "|as " in key]
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in pairs):
        row = {"trained as": variant}
        for other in dict.fromkeys(other for _, other in pairs):
            value = found.get(f"{variant}|as {other}", {})
            row[f"seen as {other}"] = " / ".join(f"{value[budget]['top1']:.1f}" for budget in sorted(value, key=int))
        rows.append(row)
    return rows


def crossed_text(found: dict[str, dict]) -> list[str]:
    """The table of `crossed_rows` with a line ahead; nothing where it is empty."""
    rows = crossed_rows(found)
    line = (
        "What the first seed of each makes of other tokens than those it was trained on, top-1 at the budgets in turn:"
    )
    return [line, markdown_table(rows)] if rows else []


def main() -> None:
    args = parse()
    bench = Bench(args)
    bench.measure()
    found = bench.found
    error = max(entry["error"] for key, value in found.items() if not key.endswith("step") for entry in value.values())
    blocks = f", first {args.blocks} blocks" if args.blocks else ""
    text = [
        f"{bench.question['model']}{blocks}, {args.img_size} px, with a linear probe on {args.probe} whole training "
        f"images of {bench.question['dataset']}; then {args.steps} steps of train/cvit.py with `{args.recipe}`, each "
        f"at one of the budgets {', '.join(map(str, args.budgets))}. Top-1 in per cent before -> after, mean of the "
        f"seeds (± half their range), {args.split}; standard error of a figure up to {error:.1f}, all see the same. "
        f"collapse, bayer, random: `{args.rest}` with these orders; none: nothing for the rest; downscaled: the image "
        "shrunk to as many tokens or a few less (biased: these count for their areas); whole: trained on all patches.",
        markdown_table(rows_of(found)),
        *crossed_text(found),
        *([args.note] if args.note else []),
    ]
    data = {"question": bench.question, "found": found}
    write_section(f"adapt_{args.name}", f"A ViT adapted: {args.name}", "\n\n".join(text), data)
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
