"""What the train scripts share: Accelerate set-up, schedule, EMA, checkpoints, logs and progress.

A script keeps its own loop; `Run` does the rest::

    run = Run(args, model, dataset, transform)
    for images, labels in run:
        out = run.model(images, run.rand(len(images), 64))
        run.step(out["loss"], out)
    run.finish()
"""

from .args import TrainArgs, parse_args, run_script
from .distributed import processes
from .dry_run import NoiseCodec, note, part_for
from .orders import data_set_orders, order_source
from .run import Run

__all__ = [
    "NoiseCodec",
    "Run",
    "TrainArgs",
    "data_set_orders",
    "note",
    "order_source",
    "parse_args",
    "part_for",
    "processes",
    "run_script",
]
