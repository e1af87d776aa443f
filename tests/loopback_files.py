"""Files that the tests of the loopback Hub send and fetch."""

from pathlib import Path

import numpy as np

WEIGHTS = "model.safetensors"
BIG = np.random.default_rng(0).bytes(300_000)
FILES = {"config.json": b'{"a": 1}\n', WEIGHTS: BIG, "sub/x.txt": b"", "sub/deep/y.png": b"\x89PNG" + BIG[:999]}


def write(folder, files):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
