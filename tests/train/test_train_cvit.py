"""CViT's training and the ranker's on features, in miniature, through the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from distributed_worker import load_script
from safetensors.torch import load_file

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.hub.save import save_model, weights_hash

ROOT = Path(__file__).parents[2]
SMALL = json.dumps({"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8})
COMMON = ["--dataset", "digits", "--tensorboard", "false", "--log_every", "5"]


def train(script: str, output: Path, *args: str, ok: bool = True) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / script), *COMMON, "--output", str(output), *args],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr[-2000:]
    return done.stdout + done.stderr


def train_cvit(output: Path, *args: str, **kwargs) -> str:
    return train("cvit.py", output, "--model", "cvit_tiny_patch4_32", "--model_args", SMALL, *args, **kwargs)


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A CViT that knows the digits, used to random orders and every remainder."""
    folder = tmp_path_factory.mktemp("rvit")
    arguments = ["--orderer", "random", "--remainder", "none", "coarse", "fused", "--steps", "300", "--lr", "2e-3"]
    return folder, train_cvit(folder, *arguments, "--batch_size", "64", "--crop_scale", "0.9", "--keep", "0.5")


@pytest.mark.slow
def test_learns_digits_and_saves_what_it_was_asked_for(trained):
    folder, printed = trained
    recipe = json.loads((folder / "recipe.json").read_text())
    accuracy = recipe["validation_top1"]
    assert set(accuracy) == {"1.0", "0.5"} and accuracy["1.0"] > 25 and accuracy["0.5"] > 15, accuracy  # chance is 10
    assert "top-1:" in printed
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (model.keep, model.orderer.baseline_name, model.remainder) == (0.5, "random", "none")
    assert model.num_classes == 10


@pytest.mark.slow
def test_ranker_learns_from_its_features_and_orders_another_training(trained, tmp_path):
    train("ranker.py", tmp_path / "ranker", "--target", "features", "--teacher", f"local-dir:{trained[0]}",
          "--model_args", '{"img_size": 32, "dim": 32, "depth": 1, "rank": 8}', "--steps", "100",
          "--batch_size", "16", "--lr", "2e-3",
          "--teacher_remainder", "none", "coarse")  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "ranker" / "log.jsonl").read_text().splitlines()]
    assert sum(line["unexplained"] for line in log[-4:]) / 4 < 0.99 < log[0]["unexplained"]  # it explains some of it
    ranker = CollapseOrder.from_pretrained(str(tmp_path / "ranker"))
    assert ranker(torch.rand(2, 3, 32, 32)).grid == (4, 4)
    table = tmp_path / "orders"
    arguments = [
        "--orderer",
        str(tmp_path / "ranker"),
        "--order_table",
        str(table),
        "--steps",
        "4",
        "--batch_size",
        "8",
    ]
    arguments += ["--init", str(trained[0]), "--jitter", "0.05", "--random_orders", "0.2", "--val_split", ""]
    train_cvit(tmp_path / "first", *arguments)
    made = {file.name: file.stat().st_mtime_ns for file in table.iterdir()}
    train_cvit(tmp_path / "second", *arguments, "--grad_checkpointing", "true")
    assert {file.name: file.stat().st_mtime_ns for file in table.iterdir()} == made
    assert same_weights(tmp_path / "first", tmp_path / "second")
    # the orders are on the ranker's grid: they serve smaller patches, too
    shape = ["--model_args", json.dumps({**json.loads(SMALL), "patch_size": 2}), "--keep_schedule", "40,90,1.0"]
    train_cvit(tmp_path / "finer", *arguments, *shape, "--remainder", "none", "mixed")
    assert {file.name: file.stat().st_mtime_ns for file in table.iterdir()} == made
    finer, first = (load_file(tmp_path / name / "model.safetensors") for name in ("finer", "first"))
    assert finer["patch_embed.proj.weight"].shape[-1] == 2 and finer["pos_embed"].shape[1] == 257
    assert finer["blocks.0.attn.qkv.weight"].shape == first["blocks.0.attn.qkv.weight"].shape
    said = train_cvit(tmp_path / "third", *arguments, "--orderer", "bayer", ok=False)
    assert "order_table" in said and "Traceback" not in said


@pytest.mark.slow
def test_only_the_sizes_learn_without_labels(trained, tmp_path):
    folder = trained[0]
    said = train("cvit.py", tmp_path / "sizes", "--model", f"local-dir:{folder}", "--pretrained", "true",
                 "--tune", "sizes", "--remainder", "split", "--keep", "6", "--keep_schedule", "6,9", "--steps", "30",
                 "--lr", "1e-3", "--batch_size", "32", "--orderer", "bayer", "--val_split", "")  # fmt: skip
    assert "Traceback" not in said
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "sizes"))
    assert set(after) - set(before) == {"size_embed"} and after["size_embed"].abs().min(1).values.max() > 0
    assert all(torch.equal(after[name], value) for name, value in before.items())
    log = [json.loads(line) for line in (tmp_path / "sizes" / "log.jsonl").read_text().splitlines()]
    assert "loss" not in log[0] and log[-1]["divergence"] < log[0]["divergence"]


@pytest.mark.slow
def test_goes_on_where_it_was(tmp_path):
    common = ["--orderer", "variance", "--val_split", "", "--mixup", "0.2", "--distill", "0.5", "--layer_decay", "0.8"]
    common += ["--freeze", "1", "--remainder", "coarse", "--area_bias", "0.5", "--keep", "0.5"]
    train_cvit(tmp_path / "run", "--steps", "3", "--batch_size", "8", *common)
    first = load_file(tmp_path / "run" / "model.safetensors")
    train_cvit(tmp_path / "run", "--steps", "6", "--batch_size", "8", *common)
    moved = {name for name, value in load_file(tmp_path / "run" / "model.safetensors").items()
             if not torch.equal(value, first[name])}  # fmt: skip
    assert {name.split(".")[0] for name in moved} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in moved if name.startswith("blocks")} == {"1"}
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert (model.keep, model.remainder, model.area_bias) == (0.5, "coarse", 0.5)
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [3, 5, 6] and all(line["divergence"] >= 0 for line in log)


def test_mask_rates_of_the_schedules():
    args = load_script("cvit").Args
    cosine = [1 - args().budget(u) for u in (0.0, 0.5, 1.0)]
    assert cosine == pytest.approx([0.0, 0.99 * (1 - 2**-0.5), 0.99])  # low rates are favoured
    assert args(keep_schedule="uniform").budget(0.5) == pytest.approx(0.505)
    assert args(keep_schedule="full").budget(0.9) == 1.0
    assert args(keep_schedule="0.22").budget(0.3) == 0.22
    assert [args(keep_schedule="16, 64,1.0").budget(u) for u in (0.0, 0.34, 0.67, 0.99)] == [16, 64, 1.0, 1.0]
    assert args(keep_schedule=".22").budget(0.3) == 0.22
    for wrong in ("nonsense", "0", "1.5", "nan", "16,,32"):
        with pytest.raises(CollapseError, match="keep_schedule: must be"):
            args(keep_schedule=wrong)
    with pytest.raises(CollapseError, match="order_table"):
        args(order_table="x", mixup=0.2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"])
def test_the_first_blocks_and_the_embeddings_are_frozen(name):
    freeze_first = load_script("cvit").freeze_first
    model = timm.create_model(name, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    freeze_first(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_first(model, 2)
    trained = {name.partition(".norm")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in trained}
    assert trained in ({"blocks.2", "norm", "head"}, {"blocks.2", "fc_norm", "head"})
    with pytest.raises(CollapseError, match=r"freeze: must be in \[0, 3\], the model's blocks, got 4"):
        freeze_first(model, 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"area_bias": -0.5}, "area_bias: must be at least 0, got -0.5"),
        ({"jitter": -1.0}, "jitter: must be at least 0, got -1.0"),
        ({"distill": float("nan")}, "distill: must be at least 0, got nan"),
        ({"random_orders": 1.5}, r"random_orders: must be in \[0, 1\], got 1.5"),
        ({"crop_scale": 2.0}, r"crop_scale: must be in \[0, 1\], got 2.0"),
        ({"tune": "head"}, "tune: must be all or sizes, got 'head'"),
        ({"tune": "sizes"}, "remainder: must not be none with --tune sizes"),
        ({"tune": "sizes", "remainder": ["split"], "mixup": 0.2}, "mixup: must be 0 with --tune sizes"),
    ],
)
def test_values_that_cannot_train_are_refused(wrong, message):
    with pytest.raises(CollapseError, match=message):
        load_script("cvit").Args(**wrong)


def test_a_fixed_budget_is_a_count_or_a_ratio():
    args = load_script("cvit").Args
    assert {args(keep="64", keep_schedule="fixed").budget(u) for u in (0.0, 0.5, 0.99)} == {64}
    assert args(keep=".5", keep_schedule="fixed").budget(0.3) == 0.5
    for wrong in ("few", "0", "-3", "1.5"):
        with pytest.raises(CollapseError, match="keep must be"):
            args(keep=wrong)


def test_budgets_that_have_no_tokens_are_refused_before_the_training():
    script = load_script("cvit")
    model = timm.create_model("cvit_tiny_patch16", orderer="bayer", embed_dim=24, depth=1, num_heads=2)  # 14 x 14
    script.check_budgets(script.Args(keep_schedule="49,100", remainder=["none", "mixed"], keep="0.5"), model, (14, 14))
    assert model.remainder == "none"  # the first
    for values, message in (
        ({"remainder": ["none", "mixed"]}, r"\(14, 14\) can be halved 1 times, to 49 cells, and keep is"),
        ({"remainder": ["mixed"], "keep_schedule": "full", "keep": "0.22"}, "to 49 cells, and keep is 43 tokens"),
        ({"keep_schedule": "16,500"}, r"keep must be .*\[2, 196\].*got int 500"),
        ({"remainder": ["coarse"], "coarse_share": [0.5, 2.0]}, r"coarse_share must be in \(0, 1\], got 2.0"),
        ({"remainder": ["split"], "tune": "sizes"}, "keep_schedule: must be of less than all 196 patches.*'cosine'"),
    ):
        with pytest.raises(CollapseError, match=message):
            script.check_budgets(script.Args(**values), model, (14, 14))


class Counting(CollapseOrder):
    """Bayer's order; remembers how many places it was asked for."""

    def __init__(self):
        super().__init__("bayer")
        self.asked = []

    def forward(self, images, grid=None, upto=None, **more):
        self.asked.append(upto)
        return super().forward(images, grid, upto, **more)


@pytest.mark.parametrize(
    "arguments, asked",
    [
        (["--keep_schedule", "full"], []),
        (["--keep_schedule", "full", "--jitter", "0.1", "--random_orders", "0.5"], []),
        (["--orderer", "random"], []),
        (["--orderer", "random", "--jitter", "0.1"], []),
        (["--keep_schedule", "0.25"], [4, 4]),
        (["--keep", "5", "--keep_schedule", "fixed", "--jitter", "0.1"], [5, 5]),
        (["--keep_schedule", "full", "--distill", "0.5"], []),
    ],
)
def test_orders_are_computed_only_where_and_as_far_as_they_are_needed(arguments, asked, monkeypatch, tmp_path):
    script, orderer = load_script("cvit"), Counting()
    collapse = script.collapse
    monkeypatch.setattr(script, "collapse", lambda model, name, **more: collapse(model, orderer, **more))
    model = ["--model", "cvit_tiny_patch4_32", "--model_args", SMALL]
    run_main(script, monkeypatch, tmp_path, *model, "--orderer", "bayer", *arguments)
    assert orderer.asked == asked


def run_main(script, monkeypatch, output: Path, *args: str) -> None:
    """Two steps of the script, in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    common = ["--steps", "2", "--batch_size", "2", "--val_split", "", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["cvit.py", *COMMON, *common, *args])
    script.main()


def test_a_saved_model_is_trained_on_with_the_orderer_beside_its_weights(monkeypatch, tmp_path):
    shape = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "rank": 8, "phases": (0.0, 0.25)}
    orderer = CollapseOrder(timm.create_model("collapse_ranker_tiny", **shape))
    save_model(timm.create_model("cvit_tiny_patch4_32", orderer=orderer, **json.loads(SMALL)), tmp_path / "first")
    source = ["--model", f"local-dir:{tmp_path / 'first'}", "--pretrained", "true", "--keep", "0.5"]
    run_main(load_script("cvit"), monkeypatch, tmp_path / "second", *source)
    trained = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True)
    assert trained.keep == 0.5
    assert weights_hash(trained.orderer) == weights_hash(orderer)


def test_a_naflexvit_is_trained(monkeypatch, tmp_path):
    shape = json.dumps({"embed_dim": 48, "depth": 1, "num_heads": 3})
    run_main(load_script("cvit"), monkeypatch, tmp_path, "--model", "naflexvit_base_patch16_gap", "--model_args", shape)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).orderer.source == "collapse_ranker_tiny_224"


def test_timms_optimizer_scheduler_and_ema_take_a_cvit():
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    cvit = timm.create_model("cvit_tiny_patch4_32", orderer="bayer", **json.loads(SMALL))
    optimizer = create_optimizer_v2(cvit, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, updates_per_epoch=2)
    ema = ModelEmaV3(cvit, decay=0.5)
    before = cvit.blocks[0].attn.qkv.weight.clone()
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) == 4  # embedding, two blocks, head
    loss = cvit(torch.randn(4, 3, 32, 32)).logsumexp(1).sum() + cvit.head.weight.sum()
    loss.backward()
    optimizer.step()
    scheduler.step(1)
    ema.update(cvit)
    assert not torch.equal(cvit.head.weight, ema.module.head.weight)
    assert before.shape == ema.module.blocks[0].attn.qkv.weight.shape
