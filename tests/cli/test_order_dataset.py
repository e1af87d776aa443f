"""`timm-collapse order-dataset`: one process, several, a killed and restarted run, and the scripts that read it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from distributed_worker import load_script

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.cli import order_dataset
from timm_collapse.cli.main import build_parser
from timm_collapse.data import OrderTable, eval_transform, open_dataset
from timm_collapse.engine import run_script

ROOT = Path(__file__).parents[2]
QUICK = ["--dataset", "digits", "--workers", "0", "--device", "cpu"]
SMALL_RANKER = ["--orderer", "collapse_ranker_tiny", "--img-size", "16", "--grid", "4", "4", "--split", "validation",
                "--shard-size", "16", "--batch-size", "4"]  # fmt: skip
"""90 batches in 23 files: enough to be killed in the middle."""
SIZES = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 32,
         "decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 1, "diffloss_w": 32, "patch_size": 2}  # fmt: skip


@pytest.fixture
def run(capsys):
    """Runs the command in this process; returns stdout and stderr."""

    def run(*argv):
        order_dataset.run(build_parser().parse_args(["order-dataset", *QUICK, *map(str, argv)]))
        return capsys.readouterr()

    return run


def start(folder, *argv, processes):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = ["-m", "timm_collapse", "order-dataset", *QUICK, *map(str, argv), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([sys.executable, *launch, *arguments], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_orders_of_the_ranker_and_what_is_printed(run, tmp_path):
    out, err = run("--split", "validation", "--part", "0/12", "--shard-size", 20, "--output", tmp_path / "orders")
    assert "orders of 30 images (digits validation 0/12), 8 x 8 patches, mirrored, by collapse_ranker_tiny: 2 f" in out
    assert "checked: 30 rows, as many as images; 30 different keys" in out
    assert "30/30" in err and "file 2 of 2" in err
    dataset = open_dataset("digits", "validation", "0/12").dataset
    table = OrderTable.load(tmp_path / "orders", dataset=dataset)
    orderer = CollapseOrder.from_pretrained("collapse_ranker_tiny")
    image = eval_transform(64, orderer.mean, orderer.std)(dataset[21][0])
    for mirrored, view in ((False, image), (True, image.flip(-1))):
        found = table.lookup(torch.tensor([21]), torch.tensor([mirrored]))
        expected = orderer(view[None])
        assert (found.ranks - expected.ranks).abs().float().mean() < 0.5  # other attention kernels, other last bits
    out, err = run("--split", "validation", "--part", "0/12", "--shard-size", 20, "--output", tmp_path / "orders")
    assert "checked: 30 rows" in out
    before = contents(tmp_path / "orders")
    with pytest.raises(CollapseError, match=r"img_size is \[64, 64\], not \[32, 32\]; choose another folder"):
        run(
            "--split",
            "validation",
            "--part",
            "0/12",
            "--shard-size",
            20,
            "--img-size",
            32,
            "--output",
            tmp_path / "orders",
        )
    assert contents(tmp_path / "orders") == before


def test_a_side_alone_and_half_precision(run, tmp_path):
    common = ["--split", "validation", "--part", "0/12", "--no-mirror"]
    out, _ = run(*common, "--output", tmp_path / "full")
    assert "8 x 8 patches, by" in out
    assert pq.read_schema(next((tmp_path / "full").iterdir())).names == ["key", "label", "ranks"]
    run(*common, "--precision", "bf16", "--output", tmp_path / "half")
    full, half = (OrderTable.load(tmp_path / name).ranks.float() for name in ("full", "half"))
    assert len(full) == 1 and 0.85 < torch.corrcoef(torch.stack([full.flatten(), half.flatten()]))[0, 1] < 1


@pytest.mark.slow
def test_one_process_two_and_a_killed_run_that_others_end_write_the_same(run, tmp_path):
    run(*SMALL_RANKER, "--output", tmp_path / "one")
    expected = contents(tmp_path / "one")
    assert len(expected) == 23

    two = start(tmp_path / "two", *SMALL_RANKER, processes=2)
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, err[-2000:]
    assert "checked: 360 rows, as many as images; 360 different keys" in out and out.count("checked") == 1
    assert contents(tmp_path / "two") == expected

    killed = start(tmp_path / "killed", *SMALL_RANKER, processes=2)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed").glob("*.parquet"))) < 3:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for process in (killed, *psutil.Process(killed.pid).children(recursive=True)):
        process.kill()
    killed.communicate()
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.parquet")}
    assert 3 <= len(kept) < 23
    run(*SMALL_RANKER, "--output", tmp_path / "killed")
    assert contents(tmp_path / "killed") == expected
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == when for name, when in kept.items())


def train_here(monkeypatch, script, *argv):
    """Runs a train script in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    common = ["--dataset", "digits", "--part", "0/20", "--tensorboard", "false", "--steps", 2, "--batch_size", 4]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, (*common, *argv))])
    run_script(load_script(script).main)


@pytest.mark.parametrize(
    "script, size, arguments",
    [
        ("cmar", 8, ["--model_args", json.dumps(SIZES)]),
        ("cvit", 32, ["--model", "cvit_tiny_patch4_32", "--val_split", "", "--model_args",
                      '{"embed_dim": 48, "depth": 1, "num_heads": 3, "patch_size": 8}']),
    ],
)  # fmt: skip
def test_train_scripts_read_a_folder_and_make_the_same_one(run, tmp_path, monkeypatch, capsys, script, size, arguments):
    made = ["--part", "0/20", "--orderer", "variance", "--grid", 4, 4, "--img-size", size]
    made += ["--output", tmp_path / "orders"]
    run(*made, *([] if script == "cvit" else ["--no-mirror"]), "--shard-size", 30)
    before = contents(tmp_path / "orders")
    arguments = ["--orderer", "variance", *arguments]
    train_here(monkeypatch, script, *arguments, "--output", tmp_path / "a", "--order_table", tmp_path / "orders")
    assert contents(tmp_path / "orders") == before and not (tmp_path / "a" / "orders").exists()
    assert (tmp_path / "a" / "model.safetensors").exists()

    train_here(monkeypatch, script, *arguments, "--output", tmp_path / "b", "--order_table", tmp_path / "own")
    own, given = (OrderTable.load(tmp_path / name) for name in ("own", "orders"))
    assert own.layout["files"] == 1 and given.layout["files"] == 3 and own.source == given.source
    assert torch.equal(own.ranks, given.ranks) and torch.equal(own.labels, given.labels)

    (tmp_path / "old.safetensors").write_bytes(b"")
    for table, message in (("old.safetensors", "is no folder of orders; make it again with `timm-collapse order-data"),
                           ("others", "orderer is 'bayer', not 'variance'")):  # fmt: skip
        if table == "others":
            run(*made[:2], "--orderer", "bayer", "--grid", 4, 4, "--img-size", size, "--output", tmp_path / "others")
        with pytest.raises(SystemExit) as stopped:
            train_here(monkeypatch, script, *arguments, "--output", tmp_path / "c", "--order_table", tmp_path / table)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--orderer", "bayer"], "--grid must be given for the baseline 'bayer'"),
        (["--shard-size", "0"], "--shard-size must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--split", "third"], "split: digits has train and validation"),
        (["--part", "1437/1438"], "has no images of split 'train', part '1437/1438'"),
        (["--dataset", "wds/none.tar"], "names the tar file none.tar, which does not exist"),
        (["--device", "nowhere"], "--device: 'nowhere' cannot be used"),
    ],
)
def test_wrong_arguments(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CollapseError) as error:
        run("--output", "orders", *arguments)
    assert message in str(error.value) and not list(tmp_path.iterdir())


def test_the_command_is_declared():
    args = build_parser().parse_args(["order-dataset", "--dataset", "digits", "--output", "orders"])
    assert args.command is order_dataset and args.shard_size == 10_000 and args.mirror
