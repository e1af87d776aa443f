import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from timm_collapse.engine import Run, TrainArgs, parse_args
from timm_collapse.engine.draws import Draws
from timm_collapse.engine.ema import Ema
from timm_collapse.order import CollapseError

ROOT = Path(__file__).parents[2]
SMALL = '{"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "decoder_dim": 32, "decoder_depth": 1}'
COMMON = ["--dataset", "digits", "--model_args", SMALL, "--tensorboard", "false", "--log_every", "2"]


def command(script: str, output: Path, *args: str, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        # `accelerate launch --cpu --num_processes 2` starts one process where there is no MPI; torchrun starts two
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launch, str(ROOT / "train" / script), *COMMON, "--output", str(output), *args]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


def train(*args, **kwargs) -> None:
    done = subprocess.run(command(*args, **kwargs), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    arguments = ["--steps", "40", "--batch_size", "8", "--checkpoint_minutes", "0"]
    train("comae.py", tmp_path / "whole", *arguments)
    broken = subprocess.Popen(
        command("comae.py", tmp_path / "broken", *arguments), env=environment(), stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "broken" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert broken.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert not (tmp_path / "broken" / "model.safetensors").exists()  # it was in mid-training
    train("comae.py", tmp_path / "broken", *arguments)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == log.read_text()


@pytest.mark.slow
def test_two_processes_train_as_one_where_steps_leave_parameters_without_gradient(tmp_path):
    train("comae.py", tmp_path / "one", "--steps", "6", "--batch_size", "8", "--ema", "0")
    train("comae.py", tmp_path / "two", "--steps", "6", "--batch_size", "4", "--ema", "0", processes=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()[-1:]]
              for run in ("one", "two")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class Parabola(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2))
        self.other = torch.nn.Parameter(torch.ones(2, 2))

    def forward(self, images):
        return (self.weight - images.mean()).square().sum() + self.other.square().sum()


class Constant(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index)), index


def run(tmp_path, **kwargs) -> Run:
    args = TrainArgs(**{"output": str(tmp_path), "tensorboard": False, "steps": 4, "batch_size": 2, **kwargs})
    return Run(args, Parabola(), Constant(), lambda image: image, quiet=True)


def test_accumulated_micro_steps_equal_one_large_batch(tmp_path):
    found = []
    for name, kwargs in (("a", {"batch_size": 4}), ("b", {"batch_size": 2, "grad_accum": 2})):
        training = run(tmp_path / name, ema=0, **kwargs)
        for images, _ in training:
            training.step((training.model.weight - images.mean((1, 2, 3))[:, None, None]).square().sum((1, 2)).mean())
        found.append(training.finish().weight.detach())
    assert torch.allclose(*found, atol=1e-6)


def test_frozen_parameters_do_not_move_nor_decay(tmp_path):
    training = run(tmp_path, ema=0, weight_decay=0.5)
    for images, _ in training:
        training.step(training.model(images), frozen=[training.bare.other])
    model = training.finish()
    assert torch.equal(model.other, torch.ones(2, 2)) and not torch.equal(model.weight, torch.ones(2, 2))


def test_schedule_warms_up_and_ends_near_zero(tmp_path):
    training = run(tmp_path, steps=100, warmup=0.1, lr=1.0)
    rates = [training.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates) and rates[-1] < 1e-3
    assert rates[54] == pytest.approx(0.53, abs=0.03)  # half way down the cosine


def test_not_finite_loss_is_an_error(tmp_path):
    training = run(tmp_path)
    with pytest.raises(CollapseError, match="loss: not finite"):
        for images, _ in training:
            training.step(training.model(images) * float("nan"))


def test_resume_with_other_arguments_is_refused(tmp_path):
    training = run(tmp_path, steps=2)
    for images, _ in training:
        training.step(training.model(images))
    training.finish()
    with pytest.raises(CollapseError, match="lr 0.001 -> 0.5"):
        run(tmp_path, steps=2, lr=0.5)
    assert run(tmp_path, steps=3, log_every=1).done == 2  # longer, or logged otherwise: allowed
    assert run(tmp_path, steps=3, batch_size=1, grad_accum=2).done == 2  # the same images a step
    with pytest.raises(CollapseError, match="images a step 2 -> 4"):
        run(tmp_path, steps=3, grad_accum=2)


def test_draws_of_processes_are_those_of_one_and_of_accumulated_micro_steps():
    def drawn(batch: int, world: int, number: int):
        ranks = [Draws(seed=3, rank=rank, world=world) for rank in range(world)]
        for draws in ranks:
            draws.restart(number)
        parts = [[d.rand(batch), d.randn(batch, 2, 5), d.rand(batch, 3)] for d in ranks]
        assert len({(d.uniform(), d.randint(0, 1000)) for d in ranks}) == 1
        return [torch.cat(each) for each in zip(*parts)]

    one = drawn(8, 1, 5)
    for batch, world in ((4, 2), (1, 8)):
        assert all(torch.equal(a, b) for a, b in zip(one, drawn(batch, world, 5)))
    first, second = drawn(4, 1, 10), drawn(4, 1, 11)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(one, zip(first, second)))
    assert not torch.equal(one[0], one[2][:, 0])  # a draw goes on where the one before ended


def test_draws_of_neighbouring_samples_are_independent():
    draws = Draws(seed=0, rank=0, world=1)
    uniform, normal = draws.rand(4000, 8), draws.randn(4000, 64)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and normal.std().item() == pytest.approx(1, abs=0.01)
    for x in (uniform, normal):
        x = (x - x.mean()) / x.std()
        assert abs((x[1:] * x[:-1]).mean()) < 0.02 and abs((x[2:] * x[:-2]).mean()) < 0.02
    draws.restart(1)
    assert not torch.equal(draws.rand(4000, 8), uniform)


def test_moving_average_is_timms():
    from timm.utils import ModelEmaV3

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    mine, timms = Ema(model, 0.6), ModelEmaV3(model, decay=0.6, use_warmup=True)
    for step in range(1, 9):
        model(torch.randn(5, 3))  # moves the statistics, and an integer count
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        mine.update(model, step)
        timms.update(model, step=step)
        for name, value in timms.module.state_dict().items():
            assert torch.allclose(mine.state[name], value), (step, name)


def test_finish_gives_the_averaged_model_without_what_training_wrapped_around_it(tmp_path):
    training = run(tmp_path, lr=0.1)
    for images, _ in training:
        training.step(training.model(images))
    model = training.finish()
    assert type(model) is Parabola and not model.training and "forward" not in vars(model)
    assert torch.equal(model.weight, training.ema.state["weight"]) and model.weight.requires_grad
    assert not torch.equal(model.weight, training.bare.weight)


def test_precision_is_accelerates_where_none_is_given(monkeypatch):
    assert TrainArgs().precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert (TrainArgs().precision, TrainArgs(precision="no").precision) == ("bf16", "no")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    training = run(tmp_path)
    for images, _ in training:
        training.step(training.model(images))
    training.finish()
    with pytest.raises(CollapseError, match="holds another model"):
        Run(TrainArgs(output=str(tmp_path), tensorboard=False), torch.nn.Linear(3, 3), Constant(), None, quiet=True)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"workers": -1}, "workers: must be at least 0, got -1"),
        ({"ema": 1.0}, r"ema: must be in \[0, 1\), got 1.0"),
        ({"warmup": 2.0}, r"warmup: must be in \[0, 1\], got 2.0"),
        ({"clip": -1.0}, "clip: must be at least 0, got -1.0"),
        ({"lr": -1e-3}, "lr: must be at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr: must be at least 0, got nan"),
        ({"lr": float("inf")}, "lr: must be at least 0, got inf"),
    ],
)
def test_values_that_cannot_train_are_refused(values, message):
    with pytest.raises(CollapseError, match=message):
        TrainArgs(**values)


def test_models_that_there_are_not_are_named():
    @dataclasses.dataclass
    class Args(TrainArgs):
        model: str = "cvit_tiny_patch4_32"
        model_args: str = "{}"

    Args()
    Args(model="local-dir:anywhere")
    for values, message in (
        ({"model": "nosuch"}, "model: 'nosuch' is not registered"),
        ({"model_args": "x"}, "model_args: must be a JSON object .* got 'x'"),
        ({"model_args": "[1]"}, "model_args: must be a JSON object"),
    ):
        with pytest.raises(CollapseError, match=message):
            Args(**values)


@dataclasses.dataclass
class SomeArgs(TrainArgs):
    keep_schedule: str = "cosine"
    shares: list[float] = dataclasses.field(default_factory=lambda: [0.5])


def test_arguments_from_file_and_their_errors(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("steps: 7\nlr: 0.5\n")
    args = parse_args(TrainArgs, "", [f"--config={tmp_path / 'a.yaml'}", "--lr", "0.25"])
    assert (args.steps, args.lr) == (7, 0.25)
    for argv, message in (
        (["--config", str(tmp_path / "none.json")], "existing"),
        (["--bogus", "1"], "--bogus"),
        (["--precision", "bf32"], "bf32"),
        (["--steps", "0"], "steps: must be at least 1, got 0"),
        (["--steps", "few"], "invalid int value: 'few'"),
        (["--resume", "maybe"], "'maybe'"),
    ):
        with pytest.raises(SystemExit):
            parse_args(TrainArgs, "", argv)
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_values_of_a_file_are_typed_as_on_the_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "keep_schedule: 0.22\nbatch-size: 3\nlr: 1e-4\nema: 0\ntensorboard: false\nshares: [0.5, 1]\n"
        "model_args: {depth: 2}\n"
    )
    args = parse_args(SomeArgs, "", ["--config", str(file), "--log-every", "5"])
    assert (args.keep_schedule, args.batch_size, args.lr, args.ema, args.tensorboard) == ("0.22", 3, 1e-4, 0.0, False)
    assert (args.shares, args.model_kwargs, args.log_every) == ([0.5, 1.0], {"depth": 2}, 5)
    file.write_text("shares: 1\n")
    assert parse_args(SomeArgs, "", ["--config", str(file)]).shares == [1.0]
    file.write_text("")
    assert parse_args(SomeArgs, "", ["--config", str(file)]) == SomeArgs()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"stepz": 7}', "has unknown arguments: stepz"),
        ("- steps", "must have lines 'name: value', got a list"),
        ("steps", "must have lines 'name: value', got a str"),
        ("steps: many", "invalid int value: 'many'"),
        ("steps: 1.5", "invalid int value: '1.5'"),
        ("steps: [1, 2]", "steps in .* must be one value, got \\[1, 2\\]"),
        ("steps:", "steps in .* must be one value, got None"),
        ("shares: []", "shares in .* must be one or several values"),
        ("tensorboard: perhaps", "perhaps"),
        ("lr: -1", "lr: must be at least 0, got -1.0"),
        ("steps: [", "is no YAML or JSON"),
    ],
)
def test_wrong_files_are_one_line(text, message, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_args(SomeArgs, "", ["--config", str(tmp_path / "a.yaml")])
    said = capsys.readouterr().err
    assert re.search(message, said) and said.startswith("error: ") and said.count("\n") == 1


def test_engine_draws_no_pictures():
    code = "import sys, timm_collapse.engine; print({'matplotlib', 'timm_collapse.plots'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True).strip() == "set()"


def test_activations_are_recomputed_where_the_model_can(tmp_path):
    with pytest.raises(CollapseError, match="grad_checkpointing: Parabola cannot recompute"):
        run(tmp_path, grad_checkpointing=True)
