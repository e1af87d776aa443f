"""The benchmark against the clock: its time, what it records of failures, its tables, and the parts of its training.

Nothing is measured here; tasks are small functions, but their processes are real.
"""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_collapse import CollapseError
from timm_collapse.evaluation import count_macs

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu  # noqa: E402
import gpu_train  # noqa: E402
from gpu_report import TABLES, section  # noqa: E402
from gpu_runner import Bench, Box, Record, Task, attempt, reason, run_part  # noqa: E402
from token_merging import TokenMerging, merging_for_macs  # noqa: E402


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


# -- time


def test_a_box_counts_down_and_holds_what_is_inside_it():
    clock = Clock()
    box = Box(10.0, clock)
    inner, longer = box.inner(4.0), box.inner(99.0)
    assert (box.left, box.share, inner.left, longer.left) == (10.0, 0.0, 4.0, 10.0)
    clock.now += 5.0
    assert (box.left, box.share, inner.left, inner.share, longer.left) == (5.0, 0.5, 0.0, 1.0, 5.0)
    assert box.inner(9.0).left == 5.0
    clock.now += 50.0
    assert (box.left, box.share, box.inner(1.0).left) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("given, part, seconds", [(["mar=0.5"], "mar", 0.5), ([], "long", gpu.MINUTES["long"]),
                                                  (["mar=2", "mar=3"], "mar", 3.0)])  # fmt: skip
def test_minutes_of_a_part(given, part, seconds):
    assert gpu.minutes(given, gpu.MINUTES)[part] == seconds


@pytest.mark.parametrize("text", ["mar", "mar=", "mar=x", "mar=0", "mar=-1", "mar=inf", "mar=nan", "sleep=1", ""])
def test_minutes_that_are_none(text):
    with pytest.raises(CollapseError, match=f"minutes.*speed, order.*{text!r}"):
        gpu.minutes([text], gpu.MINUTES)


def test_all_parts_together_end_within_ten_minutes():
    planned = sum(gpu.MINUTES.values()) + gpu.parse(["--output", "x", "--train-data", "y"]).minutes["train"]
    assert planned <= gpu.parse(["--output", "x", "--train-data", "y"]).total_minutes < 10


def test_training_needs_data():
    with pytest.raises(CollapseError, match="train_data"):
        gpu.parse(["--output", "x"])
    assert gpu.parse(["--output", "x", "--tiny"]).train_data == "digits"
    assert gpu.parse(["--output", "x", "--parts", "mar"]).parts == ["mar"]


# -- failures


@pytest.mark.parametrize("error, text", [
    (ValueError("one\n\n  two\nthree"), "ValueError: one two"),
    (RuntimeError("no file /usr/lib/some/where.py, line 3"), "RuntimeError: no file some/where.py, line 3"),
    (OSError("a | b"), "OSError: a / b"),
    (MemoryError(), "MemoryError"),
    (RuntimeError("a ratio of 3/4 at http://a.b/c/d"), "RuntimeError: a ratio of 3/4 at http://a.b/c/d"),
])  # fmt: skip
def test_a_reason_is_one_line_of_no_machine(error, text):
    assert reason(error) == text


def test_a_long_reason_is_cut():
    assert len(reason(RuntimeError("x" * 999))) == 200


def test_a_failed_measurement_is_recorded_and_the_next_one_runs(tmp_path):
    record = Record(tmp_path / "found.json")
    clock = Clock()
    bench = Bench(record, "part", Box(10.0, clock))

    def fails():
        raise torch.OutOfMemoryError("too much")

    assert bench.measure("a", lambda: {"x": 1}) == {"x": 1}
    assert bench.measure("b", fails) == {"failed": "OutOfMemoryError: too much"}
    assert bench.measure("c", lambda: 2, needs=10.5) is None  # it would not end in time
    assert bench.measure("d", lambda: 3, needs=9.5) == 3
    clock.now += 11
    assert bench.measure("e", fails) is None
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["part"]
    assert found["found"] == {"a": {"x": 1}, "b": {"failed": "OutOfMemoryError: too much"}, "d": 3}
    assert found["skipped"] == ["c", "e"]


def test_an_interrupt_is_no_failure():
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_tasks_that_fail_die_or_hang_cost_their_own_time_only(tmp_path):
    record = Record(tmp_path / "found.json")
    record.part("other")["found"]["old"] = 1
    record.part("part")["found"]["old"] = 1

    def fails(bench):
        bench.measure("before", lambda: 1)
        raise ValueError("wrong")

    def dies(bench):
        bench.measure("alive", lambda: 2)
        os._exit(3)

    def hangs(bench):
        bench.measure("awake", lambda: 3)
        time.sleep(60)

    tasks = [
        Task("fails", fails),
        Task("dies", dies),
        Task("hangs", hangs, share=0.01),
        Task("too long", fails, least=99.0),
        Task("last", lambda bench: bench.measure("end", lambda: 4)),
    ]
    start = time.monotonic()
    run_part(record, "part", tasks, Box(50.0), grace=0.2)
    assert time.monotonic() - start < 50.0  # the one that hangs would take a minute
    part = record.data["parts"]["part"]
    assert {name: value for name, value in part["found"].items() if name != "hangs"} == {
        "before": 1, "fails": {"failed": "ValueError: wrong"}, "alive": 2,
        "dies": {"failed": "ended with status 3"}, "awake": 3, "end": 4,
    }  # fmt: skip
    assert part["found"]["hangs"]["failed"].startswith("stopped after ")
    assert part["skipped"] == ["too long"] and record.data["parts"]["other"]["found"] == {"old": 1}
    assert json.loads((tmp_path / "found.json").read_text()) == record.data


def test_a_part_without_time_is_named_as_skipped(tmp_path):
    record = Record(tmp_path / "found.json")
    run_part(record, "part", [Task("a", lambda bench: None), Task("b", lambda bench: None)], Box(0.0))
    assert record.data["parts"]["part"]["skipped"] == ["a", "b"]


# -- the page


SPEED = {
    "cvit_x / MACs": {"plain": 4e9, "collapsed, keep 0.5": 1.5e9},
    "cvit_x / launches": {"plain": {"operations": 125, "kernels": 130}},
    "cvit_x / eager / 1": {
        "plain": {"images_per_second": 1000.0, "memory": 2**20},
        "collapsed, keep 0.5": {"images_per_second": 1500.0, "memory": 2**20},
        "given order, keep 0.5": {"images_per_second": 2000.0, "memory": 2**20},
    },
    "cvit_x / eager / 8": {
        "plain": {"images_per_second": 80.0, "memory": 2**30},
        "collapsed, keep 0.5": {"failed": "OutOfMemoryError: no"},
        "given order, keep 0.5": {"images_per_second": 100.0, "memory": 2**29},
    },
    "cvit_x / CUDA graph / 1": {"failed": "RuntimeError: capturing"},
}


def record_of(**parts):
    entry = {"skipped": [], "notes": [], "seconds": 2.0, "hardware": "a chip"}
    about = {"hardware": "a chip", "cpu_cores": 2, "torch": "2", "timm": "1"}
    return {"about": about, "parts": {name: {**entry, "found": found} for name, found in parts.items()}}


def test_the_table_of_speed():
    text = section(record_of(speed=SPEED))
    assert "| plain | 4 | 125 | 130 | 1,000 (1.00x) | 80 (1.00x) | 1 |" in text
    assert "| collapsed, keep 0.5 | 1.5 |  |  | 1,500 (1.50x) | failed |  |" in text
    assert "| given order, keep 0.5 |  |  |  | 2,000 (2.00x) | 100 (1.25x) | 0.5 |" in text
    assert "| share of the ideal, keep 0.5 |  |  |  | 75% |  |  |" in text
    assert "- cvit_x / eager / 8: collapsed, keep 0.5: OutOfMemoryError: no" in text
    assert "- cvit_x / CUDA graph / 1: RuntimeError: capturing" in text


def test_the_other_tables():
    graph = {"seconds": 12.0, "graphs": 1, "median_difference": 0.0, "largest_difference": 0.001}
    rates = {"eager": {"images_per_second": 10.0, "memory": 1}, "compiled": {"images_per_second": 15.0, "memory": 1}}
    data = record_of(
        order={"r / cost": {"all": {"macs": 1e8, "operations": 200, "kernels": None}},
               "r / eager / 8": {"all": {"images_per_second": 5000.0, "memory": None}}},
        compile={"m / collapsed / default / 0.22 / first answer": graph, "m / collapsed / default / 0.22 / 8": rates},
        mar={"fast": {"images_per_second": 6.0, "memory": 2**30, "runs": 3},
             "literal": {"images_per_second": 2.0, "memory": 2**31, "runs": 1}},
        long={"forward, keep 0.05": {"tokens": 2509, "seconds": 0.5, "peak": 3.0, "before": 0.0}},
        train={"training": {"data": "d", "decode_seconds": 3.0, "seconds": 270.0, "steps": 9000, "epochs": 90.0,
                            "images_per_second": 30000, "loss": 1.5, "batch": 1024, "weights_mb": 11.1},
               "top1": {"random": {"1": 66.66, "0.5": 60.0}}},
    )  # fmt: skip
    text = section(data)
    for row in (
        "| r | all | eager | 0.1 | 200 |  | 5,000 |",
        "| m | collapsed | default | 0.22 | 12 | 1 | 0 / 0.001 | 15 (1.50x) |",
        "| fast | 6 (3.00x) | 3 | 1 |",
        "| forward, keep 0.05 | 2,509 | 0.5 | 3 |",
        "9,000 steps of 1024, 90.0 epochs in 270 s: 30,000 images a second",
        "| random | 66.7 | 60.0 |",
    ):
        assert row in text


def test_parts_in_which_nothing_was_found_are_told_all_the_same():
    data = record_of(**{name: {} for name in TABLES})
    for part in data["parts"].values():
        part["skipped"] = ["x", "y"]
    assert section(data).count("Skipped, as the time was spent: x; y.") == len(TABLES) == len(gpu.PARTS)


def test_another_machine_is_named():
    data = record_of(long={})
    data["parts"]["long"]["hardware"] = "an older chip"
    assert "On another machine: an older chip." in section(data)


def test_the_command_writes_after_every_part_and_again_without_measuring(tmp_path, monkeypatch):
    page, output = tmp_path / "docs" / "results.md", tmp_path / "out"
    pages = []

    def tasks(part, size, gpu):
        pages.append(page.read_text() if page.exists() else "")
        return [Task("one", lambda bench: bench.measure("forward, keep 1", lambda: measured))]

    def about(bench):
        bench.record.data["about"] = record_of()["about"]
        bench.record.save()

    measured = {"tokens": 7, "seconds": 1.0, "peak": 1.0, "before": 0.0}
    monkeypatch.setattr(gpu, "tasks", tasks)
    monkeypatch.setattr(gpu, "about", about)
    monkeypatch.delattr(torch.cuda, "is_available")  # forked processes could not use a GPU that their parent asked for
    command = ["gpu.py", "--output", str(output), "--results", str(page), "--parts"]
    monkeypatch.setattr(sys, "argv", [*command, "long", "order"])
    gpu.main()
    assert "| forward, keep 1 | 7 | 1 | 1 |" in pages[1]  # before the second part began
    first = page.read_text()
    assert "a chip, 2 CPU cores" in first and str(tmp_path) not in first
    page.unlink()
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    assert page.read_text() == first and len(pages) == 2
    data = json.loads((page.parent / "gpu.json").read_text())
    assert data["hardware"] == "a chip" and data["parts"]["long"]["found"] == {"forward, keep 1": measured}


# -- training


def test_the_learning_rate_is_that_of_the_time_spent():
    top, warm = gpu_train.RECIPE["lr"], gpu_train.RECIPE["warm_up"]
    assert gpu_train.learning_rate(warm / 2) == pytest.approx(top / 2)
    assert gpu_train.learning_rate(warm) == pytest.approx(top)
    assert gpu_train.learning_rate(warm + (1 - warm) / 2) == pytest.approx(top * (0.01 + 0.99 / 2))
    assert gpu_train.learning_rate(1.0) == pytest.approx(top / 100) and gpu_train.learning_rate(0.0) > 0


def test_steps_keep_all_or_a_share():
    draws = random.Random(0)
    keeps = [gpu_train.draw_keep(draws) for _ in range(4000)]
    whole = sum(keep == 1.0 for keep in keeps) / len(keeps)
    assert whole == pytest.approx(gpu_train.RECIPE["keep_all_share"], abs=0.03)
    assert gpu_train.RECIPE["least_keep"] <= min(keeps) < gpu_train.RECIPE["least_keep"] + 0.01


def test_bytes_of_an_image():
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    assert torch.equal(gpu_train.to_bytes(Image.fromarray(pixels.numpy())), pixels.permute(2, 0, 1))
    assert gpu_train.to_bytes(Image.new("RGB", (90, 70), (1, 2, 3)))[:, 5, 60].tolist() == [1, 2, 3]


def test_crops_are_upright_parts_of_the_image_half_of_them_mirrored():
    ramp = torch.stack([torch.arange(32).expand(32, 32), torch.arange(32).expand(32, 32).mT, torch.full((32, 32), 9)])
    x = gpu_train.augment(ramp.to(torch.uint8).expand(400, -1, -1, -1), (0.3, 1.0), 0.0)
    right, down = x[:, 0].diff(dim=2)[:, 2:-2, 2:-2], x[:, 1].diff(dim=1)[:, 2:-2, 2:-2]
    mirrored = (right.mean((1, 2)) < 0).float().mean()
    assert 0.4 < mirrored < 0.6 and (down.mean((1, 2)) > 0).all()
    sizes = right.mean((1, 2)).abs() * down.mean((1, 2))  # pixels of the image a pixel of the crop, in area
    assert 0.28 < sizes.min() < 0.36 and 0.9 < sizes.max() < 1.01
    assert torch.allclose(x[:, 2], torch.tensor(9.0), atol=1e-3) and x.min() >= 0 and x.max() <= 31 + 1e-3


def test_other_colours_stay_in_range_and_keep_their_hue():
    grey = torch.full((50, 3, 8, 8), 100, dtype=torch.uint8)
    x = gpu_train.augment(grey, (1.0, 1.0), 0.3)
    assert torch.allclose(x, x[:, :1, :1, :1].expand_as(x), atol=1e-3)  # grey stays grey, and even
    assert 69 < x.min() < 80 and 120 < x.max() < 131
    bright = gpu_train.augment(torch.full((50, 3, 8, 8), 250, dtype=torch.uint8), (1.0, 1.0), 0.3)
    assert bright.max() == 255


def test_what_is_trained_is_saved_as_a_plain_model_of_half_the_bytes(tmp_path):
    average = gpu_train.build(7, gpu.TINY)
    gpu_train.save(average, 7, gpu.TINY, tmp_path / "vit", steps=3)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    for name, value in average.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    assert tuple(loaded.pretrained_cfg["mean"]) == gpu_train.TIN_MEAN
    assert loaded(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert json.loads((tmp_path / "vit" / "recipe.json").read_text())["steps"] == 3
    parameters = sum(p.numel() for p in average.parameters())
    assert (tmp_path / "vit" / "model.safetensors").stat().st_size < 2 * parameters + 10_000


# -- merging


def test_merging_costs_what_it_should():
    shape = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit, image = timm.create_model("vit_tiny_patch16_224", **shape).eval(), torch.zeros(1, 3, 40, 40)

    def cost(merges):
        return count_macs(lambda: TokenMerging(vit, [(merges + 1) // 2, merges // 2])(image))

    target = 0.7 * count_macs(lambda: vit(image))
    merging, macs = merging_for_macs(vit, target)
    assert macs == cost(sum(merging.r)) and sum(merging.r) > 0
    assert abs(macs - target) == min(abs(cost(merges) - target) for merges in range(2 * 13))
    assert math.isclose(macs, target, rel_tol=0.05)
