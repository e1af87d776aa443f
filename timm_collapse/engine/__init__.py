"""What the train scripts share: Accelerate set-up, schedule, EMA, checkpoints, logs and progress.

A script keeps its own loop; `Run` does the rest, or `DryRun`, which only measures::

    run = start_run(args, model, dataset, transform)
    for images, labels in run:
        out = run.model(images, run.random.rand(len(images), 64))
        run.step(out["loss"], out)
    model = run.finish()
"""

from .args import TrainArgs, check_model_name
from .distributed import processes
from .dry_run import note, part_for
from .latents import NoiseCodec, data_set_latents
from .orders import data_set_orders, order_source
from .run import Run
from .script import create_model, parse_args, run_script, start_run

__all__ = [
    "NoiseCodec",
    "Run",
    "TrainArgs",
    "check_model_name",
    "create_model",
    "data_set_latents",
    "data_set_orders",
    "note",
    "order_source",
    "parse_args",
    "part_for",
    "processes",
    "run_script",
    "start_run",
]
