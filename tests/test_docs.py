"""What README and docs/ tell people to type: commands parse, code compiles, README's code runs, links lead on."""

import re
import shlex
from pathlib import Path

import pytest
import timm
from distributed_worker import load_script

from timm_collapse.cli.main import build_parser
from timm_collapse.engine import parse_args
from timm_collapse.hub.download import bundled_models

ROOT = Path(__file__).parents[1]
PAGES = {
    page.name: page.read_text()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.stem != "results"
}
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    """Code of a language, without the indent of the list that it stands in."""
    for indent, found, code in BLOCK.findall(text):
        if found == language:
            yield re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def commands(text):
    """Words of each shell command."""
    for code in blocks(text, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    yield words


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    known = {"pip", "pytest", "python", "accelerate", "timm-collapse", "torchrun"}
    for words in commands(PAGES[page]):
        assert words[0] in known, words
        words = [word for word in words if word != "..."]
        script = next((ROOT / word for word in words if word.endswith(".py")), None)
        if words[0] == "timm-collapse" or "timm_collapse" in words:
            start = 1 if words[0] == "timm-collapse" else words.index("timm_collapse") + 1
            build_parser().parse_args(words[start:])  # exits where an argument does not exist
        elif script is not None:
            assert script.is_file(), words
            if script.parent.name == "train":
                rest = words[words.index(f"train/{script.name}") + 1 :]
                parse_args(load_script(script.stem).Args, "", rest)


@pytest.mark.parametrize("page", PAGES)
def test_code_compiles_and_links_lead_somewhere(page):
    for code in blocks(PAGES[page], "python"):
        compile(code, page, "exec")
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (folder / target).exists(), target


def test_the_code_of_the_readme_runs(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        return create(name, pretrained=pretrained and any(name in bundled for bundled in bundled_models()), **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    code = list(blocks(PAGES["README.md"], "python"))
    assert len(code) >= 4
    for block in code:
        exec(compile(block, "README.md", "exec"), {})


def test_the_code_of_the_page_on_vision_language_models_runs(capsys):
    """On a tiny LLaVA and a tiny CLIP, all of one page as one script."""
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from vlm_small import TEXT, TOWER, build, tokenizer

    vlm, processor = build("llava_clip")
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**TEXT, "max_position_embeddings": 77})).eval()
    photo, question = Image.effect_mandelbrot((60, 50), (-3, -2.5, 2, 2.5), 50).convert("RGB"), "is it a cat"
    names = {
        "vlm": vlm, "processor": processor, "photo": photo, "prompt": f"<image> {question}", "question": question,
        "images": torch.randn(2, 3, 64, 64), "clip": clip, "samples": [(photo, question, "no"), (photo, question, "")],
        "clip_processor": CLIPProcessor(processor.image_processor, tokenizer()),
    }  # fmt: skip
    for block in blocks(PAGES["vision_language.md"], "python"):
        exec(compile(block, "vision_language.md", "exec"), names)
    assert names["weights"][0].shape == (4, 4) and len(names["order"]) == 1
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(table) == 12 and len({share for _, keep, share in table if keep == "1"}) == 1  # the stock model
    assert all(float(share) in (0.5, 1.0) for _, _, share in table)  # everything begins with ""
