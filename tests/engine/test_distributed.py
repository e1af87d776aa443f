"""Training by several processes, on the CPU: it is the training of one, sharded (FSDP2) or not (DDP).

Tolerances: a gradient is the mean of two halves instead of one mean over the batch, so results differ by rounding,
1e-7; AdamW turns that of a gradient near 0 into a little more.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import timm
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from distributed_worker import ROOT, load_script
from safetensors.torch import load_file

import timm_collapse
from timm_collapse.engine.distributed import block_classes, frozen_parts, prepare, side_models
from timm_collapse.hub.save import save_model
from timm_collapse.order import CollapseError

COMMON = ["--dataset", "digits", "--tensorboard", "false", "--log_every", "1", "--steps", "5"]
MAR = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 32,
       "decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 1, "diffloss_w": 32, "patch_size": 2}  # fmt: skip
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
GRID = {"img_size": 16, "patch_size": 4, "dim": 32}
CMAR = [*COMMON, "--model_args", json.dumps(MAR), "--orderer", "variance", "--random_orders", "0.3", "--jitter", "0.1"]
ARGUMENTS = {
    "cmar": [*CMAR, "--grad_accum", "2"],
    # the orderer is a frozen part, and --distill runs the model a second time
    "cvit": [*COMMON, "--model", "cvit_tiny_patch4_32", "--model_args", json.dumps(VIT), "--val_split", "", "--distill",
             "0.5", "--orderer", "collapse_ranker_tiny", "--remainder", "none", "fused", "--layer_decay", "0.8"],
    # its own policy calls methods other than forward
    "ranker": [*COMMON, "--model_args", json.dumps({**GRID, "depth": 2, "rank": 8}), "--on_policy", "1"],
}  # fmt: skip
KILLED = [*ARGUMENTS["cmar"], "--checkpoint_minutes", "0"]
CASES = [(name, how) for name in ARGUMENTS for how in ("DDP", "FSDP2")]
CONFIGURATIONS = ROOT / "train" / "accelerate"


def launch(configuration: str, *command) -> list[str]:
    """Two processes, by one of the configurations."""
    file = CONFIGURATIONS / f"{configuration}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    return [sys.executable, *map(str, [*launcher, *command])]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def train_here(monkeypatch, name: str, output: Path, *args: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [name, *args, "--output", str(output)])
    load_script(name).main()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a sharded CMAR run that was killed."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = [*KILLED, "--batch_size", "4", "--output", folder, "--steps", "5000"]  # it is killed before its end
    command = launch("fsdp", ROOT / "train" / "cmar.py", *arguments, "--precision", "no")
    broken = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint.pt").exists():
        assert broken.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    processes = [*psutil.Process(broken.pid).children(recursive=True), psutil.Process(broken.pid)]
    assert len(processes) == 3
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)
    return folder


def steps_after(killed: Path) -> int:
    return torch.load(killed / "checkpoint.pt", weights_only=True)["done"] + 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory, killed):
    """Every case, as two processes trained it, and the killed run, as two processes went on with it."""
    folder = tmp_path_factory.mktemp("runs")
    size = {**GRID, "depth": 1, "decoder_dim": 32, "decoder_depth": 1}
    save_model(timm.create_model("collapse_reconstructor_tiny", **size), folder / "environment")
    ARGUMENTS["ranker"] += ["--reconstructor", str(folder / "environment")]
    shutil.copytree(killed, folder / "resumed")
    jobs = [(name, how, ARGUMENTS[name], f"{name}_{how}") for name, how in CASES]
    jobs += [("cmar", "FSDP2", [*ARGUMENTS["cmar"], "--precision", "bf16"], "bf16")]
    jobs += [("cmar", "FSDP2", [*KILLED, "--steps", str(steps_after(killed))], "resumed")]
    jobs = [[name, how == "FSDP2", [*arguments, "--batch_size", "4", "--output", str(folder / output)]]
            for name, how, arguments, output in jobs]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = launch("cpu", ROOT / "tests" / "distributed_worker.py", folder / "jobs.json")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_two_processes_train_as_one_with_twice_the_batch(runs, name, monkeypatch, tmp_path):
    train_here(monkeypatch, name, tmp_path, *ARGUMENTS[name], "--batch_size", "8")
    one = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for how in ("DDP", "FSDP2"):
        two = runs / f"{name}_{how}"
        assert losses(two) == pytest.approx(losses(tmp_path), rel=1e-6), how
        assert len(losses(two)) == 5
        assert difference(weights(tmp_path), weights(two)) < 1e-5, how  # the moving average
        checkpoint = torch.load(two / "checkpoint.pt", weights_only=True)
        assert difference(one["model"], checkpoint["model"]) < 1e-5, how
        assert checkpoint["optimizer"]["param_groups"] == one["optimizer"]["param_groups"]
        assert checkpoint["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()


@pytest.mark.slow
def test_sharded_in_bf16_is_close_to_fp32(runs):
    assert losses(runs / "bf16") != losses(runs / "cmar_FSDP2")
    assert losses(runs / "bf16") == pytest.approx(losses(runs / "cmar_FSDP2"), rel=1e-3)
    assert all(value.dtype == torch.float32 for value in weights(runs / "bf16").values())


@pytest.mark.slow
def test_killed_sharded_run_goes_on_sharded_and_by_one_process(runs, killed, monkeypatch, tmp_path):
    steps, one = steps_after(killed), tmp_path / "one"
    shutil.copytree(killed, one)
    train_here(monkeypatch, "cmar", one, *KILLED, "--batch_size", "8", "--steps", str(steps))
    assert difference(weights(runs / "resumed"), weights(one)) < 1e-5
    for folder in (one, runs / "resumed"):
        lines = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert lines == list(range(1, steps + 1))
    assert losses(runs / "resumed") == pytest.approx(losses(one), rel=1e-6)
    with pytest.raises(CollapseError, match="images a step 16 -> 8"):
        train_here(monkeypatch, "cmar", one, *KILLED, "--batch_size", "4")


def test_blocks_frozen_parts_and_models_beside_are_found():
    mar = timm.create_model("mar_mini_patch1_8", **MAR)
    assert block_classes(mar) == ["Block"] and not list(frozen_parts(mar))  # the diffusion head's blocks stay whole
    cvit = timm.create_model("cvit_tiny_patch4_32", orderer="collapse_ranker_tiny", **VIT)
    assert not list(frozen_parts(cvit)) and side_models(cvit) == [cvit.orderer]
    cvit.blocks[1].requires_grad_(False)
    assert [(parent is cvit.blocks, name) for parent, name, _ in frozen_parts(cvit)] == [(True, "1")]
    assert block_classes(timm.create_model("collapse_ranker_tiny")) == ["EvaBlock"]


def test_scalar_parameters_are_refused():
    with pytest.raises(CollapseError, match="log_temperature"):
        prepare(SimpleNamespace(is_fsdp2=True), timm.create_model("comae_tiny"), None)


# -- Accelerate's configurations ---------------------------------------------------------------------------------------

FILES = {"cpu": 2, "multi_gpu": 8, "fsdp": 8, "multi_node": 16}


@pytest.mark.parametrize("name", FILES)
def test_configurations_are_what_accelerate_reads(name):
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))  # refuses unknown keys
    assert config.num_processes == FILES[name] and config.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert config.distributed_type == (DistributedType.FSDP if name == "fsdp" else DistributedType.MULTI_GPU)
    assert (config.fsdp_config.get("fsdp_version") == 2) == (name == "fsdp")
    assert config.num_machines == (2 if name == "multi_node" else 1)


def test_all_configurations_are_tested():
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == set(FILES)


def test_processes_that_cannot_talk_are_refused(monkeypatch):
    from timm_collapse.engine import processes

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(timm_collapse.engine.distributed, "PartialState",
                        lambda cpu: SimpleNamespace(num_processes=1, device="cpu"))  # fmt: skip
    with pytest.raises(CollapseError, match="3 were started"):
        processes()
