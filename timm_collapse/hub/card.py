"""The model card: what a model is, how to use it, what it is worth, how it was trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ..collapse.base import Collapsed
from ..evaluation.report import RESULTS, markdown_table, read_section
from ..models import MAR, CollapseOrder
from .config import TASKS, HubConfig
from .files import CARD_FILE
from .pictures import Picture, draw_picture

CITATIONS = """```bibtex
@article{guo2025collapse,
  title={The Collapse of Patches},
  author={Guo and Mao and Liang and Wang and Cai},
  journal={arXiv preprint arXiv:2511.22281},
  year={2025}
}
```"""
FOLDED = r"<details><summary>The command that measured this</summary>\n\n\1\n\n</details>"
MAR_CITATION = """```bibtex
@article{li2024autoregressive,
  title={Autoregressive Image Generation without Vector Quantization},
  author={Li, Tianhong and Tian, Yonglong and Li, He and Deng, Mingyang and He, Kaiming},
  journal={arXiv preprint arXiv:2406.11838},
  year={2024}
}
```"""


def write_card(config: HubConfig, model: nn.Module, folder: Path, repo_id: str, recipe: dict[str, Any]) -> None:
    """Write README.md, and the picture that it shows, made with the very weights.

    Args:
        recipe: What recipe.json holds: arguments of the training, and accuracies that were measured after it.
    """
    picture = draw_picture(model, folder)
    accuracies = _accuracies(recipe)
    parts = [
        f"---\n{_metadata(config, repo_id, accuracies, recipe)}\n---",
        f"# {repo_id.split('/')[-1]}",
        config.summary,
        _facts(model, config),
        _use(model, repo_id),
        _shown(picture),
        _measured(config, accuracies),
        _training(config, recipe),
        "## Citation\n\n" + "\n\n".join([CITATIONS] + [MAR_CITATION] * isinstance(model, MAR)),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _metadata(config: HubConfig, repo_id: str, accuracies: dict[float, float], recipe: dict[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=config.task,
            dataset_type=config.datasets[0] if config.datasets else "custom",
            dataset_name=config.datasets[0] if config.datasets else trained_on(recipe) or "custom",
            metric_type="accuracy",
            metric_name=f"top-1 at keep {keep:g}",
            metric_value=round(accuracy, 2),
        )
        for keep, accuracy in accuracies.items()
    ]
    return ModelCardData(
        license=config.license,
        library_name="timm",
        pipeline_tag=config.task,
        tags=["timm", "timm-collapse", "patch-collapse"],
        datasets=list(config.datasets) or None,
        metrics=list(config.metrics) or None,
        base_model=config.base_model or None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    ).to_yaml()


def _facts(model: nn.Module, config: HubConfig) -> str:
    rows = [("what it does", f"{TASKS[config.task]} (`{config.architecture}`)"),
            ("parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")]  # fmt: skip
    size = model.pretrained_cfg["input_size"]
    rows.append(("images", f"{size[1]} x {size[2]} pixels"))
    if isinstance(model, Collapsed):
        rows.append(("sees", f"{_share(model.keep)}; set `model.keep` to any other share or number"))
        rows.append(("orderer", _orderer_of(model)))
        if model.remainder != "none":
            rows.append(("remainder", f"{model.remainder} tokens stand for what is dropped"))
    if isinstance(model, MAR):
        rows.append(("tokens", f"{model.grid[0]} x {model.grid[1]}, latents: {model.vae}"))
        rows.append(("classes", str(model.num_classes or "none: unconditional")))
        rows.append(("order bank", f"{int(model.bank.counts.sum())} orders" if model.bank else "none"))
    rows.append(("licence", config.license))
    return markdown_table([{"": name, " ": value} for name, value in rows])


def _share(keep: float | int) -> str:
    return f"the first {keep} patches" if isinstance(keep, int) and keep > 1 else f"the first {keep:.0%} of the patches"


def _orderer_of(model: Collapsed) -> str:
    orderer: CollapseOrder = model.orderer
    if orderer.model is None:
        return f"the baseline {orderer.baseline_name}"
    return f"a {type(orderer.model).__name__}, in the folder `orderer`"


def _use(model: nn.Module, repo_id: str) -> str:
    create = f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()'
    if isinstance(model, MAR):
        labels = "[0, 1, 2, 3]" if model.num_classes else "[0] * 4"
        guided = ', guidance_scale=3.0, guidance_schedule="constant"' if model.num_classes else ""
        lines = [
            "import timm, timm_collapse",
            create,
            f"latents = model.generate({labels}, steps=16{guided})",
            "images = model.codec().decode(latents)  # (4, 3, H, W) in [0, 1]",
        ]
        options = "--labels all --guidance-scale 3 --guidance-schedule constant " if model.num_classes else ""
        command = f"timm-collapse generate --model hf-hub:{repo_id} {options}--per-label 8 --steps 16"
        more = f"```bash\n{command}\n```"
    elif isinstance(model, Collapsed):
        lines = [
            "import timm, timm_collapse",
            create,
            "logits = model(images)  # normalised as model.pretrained_cfg says; model.keep = 1.0 sees every patch",
        ]
        more = (
            "With transformers (the same weights; `import timm_collapse` registers the architecture):\n\n"
            "```python\nimport timm_collapse\nfrom transformers import pipeline\n\n"
            f'pipeline("image-classification", "{repo_id}")("photo.jpg")\n```'
        )
    else:
        height, width = model.grid
        lines = [
            "from timm_collapse import CollapseOrder",
            f'orderer = CollapseOrder.from_pretrained("{repo_id}")',
            f"order = orderer(images, grid=({height}, {width}))  # order.indices: patches, best first; any grid",
        ]
        more = f"```bash\ntimm-collapse order photo.jpg --orderer {repo_id} --output order.png\n```"
    return "## Use\n\nWith the package timm-collapse installed:\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{more}"


def _measured(config: HubConfig, accuracies: dict[float, float]) -> str:
    parts = []
    if accuracies:
        row = {"keep": "top-1", **{f"{keep:.0%}": f"{value:.1f}%" for keep, value in accuracies.items()}}
        parts.append(markdown_table([row]))
    for name in config.results:
        section = read_section(name, config.folder.parent / RESULTS)
        if section:
            section = re.sub("^### ", "#### ", section, flags=re.MULTILINE)
            parts.append(re.sub("^(Command: .*)$", FOLDED, section, flags=re.MULTILINE))
    return "## Measured\n\n" + "\n\n".join(parts) if parts else ""


def _accuracies(recipe: dict[str, Any]) -> dict[float, float]:
    """Keep ratio -> top-1 in per cent."""
    measured = recipe.get("validation_top1") or recipe.get("validation", {}).get("top1", {})
    return {float(keep): float(value) for keep, value in measured.items()}


def trained_on(recipe: dict[str, Any]) -> str:
    """The name of the data set of a recipe, without its folder; "" where there is none."""
    return Path(str(recipe.get("arguments", {}).get("dataset", ""))).name


def _shown(picture: Picture | None) -> str:
    return f"## Pictures\n\n![{picture.caption}]({picture.file})\n\n{picture.caption}" if picture else ""


def _training(config: HubConfig, recipe: dict[str, Any]) -> str:
    text = "## Training"
    if config.train:
        text += "\n\n```bash\n" + "\n".join(config.train) + "\n```"
    elif data := trained_on(recipe):
        text += f"\n\nTrained on {data}."
    if data := recipe.get("data"):
        text += f"\n\nWhat these weights saw: {data}"
    return text + ("\n\nAll arguments are in `recipe.json`." if recipe else "")
