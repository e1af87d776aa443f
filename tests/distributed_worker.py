"""Runs train scripts one after another in one process of several: starting processes is what takes time.

accelerate launch --config_file train/accelerate/cpu.yaml tests/distributed_worker.py jobs.json, which is a list of
[script, sharded, arguments].
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_script(name: str):
    """A train script as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / "train" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(name: str, sharded: bool, arguments: list[str]) -> None:
    """One training; `sharded`: by FSDP2."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(ACCELERATE_USE_FSDP=str(sharded).lower(), FSDP_VERSION="2")
    sys.argv = [name, *arguments]
    load_script(name).main()


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(*job)
