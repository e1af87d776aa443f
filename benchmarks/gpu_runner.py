"""Measuring against the clock: tasks in processes of their own, each with its time, and a record that is always whole.

Nothing here knows what is measured. A task runs in a forked process: one that fails, hangs or harms its GPU context
costs its own time and nothing else, and the packages are imported once for all. So the parent must never touch the GPU.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

GRACE = 15.0  # seconds between a task's time being up and its end by force


class Box:
    """An amount of time that may be spent.

    Args:
        seconds: From now on.
        clock: Monotonic seconds, the same in all processes.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.start = clock, clock()
        self.end = self.start + seconds

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.end - self.clock())

    @property
    def share(self) -> float:
        """Of the time that is spent, in [0, 1]."""
        return min(1.0, (self.clock() - self.start) / max(self.end - self.start, 1e-9))

    def inner(self, seconds: float) -> Box:
        """A box that ends with this one at the latest."""
        return Box(min(seconds, self.left), self.clock)


class Record:
    """What was found, in a JSON file that is replaced as a whole whenever something is added.

    Args:
        file: Read where it exists: parts that are not measured again stay.

    Attributes:
        data: "about", facts on the machine; and "parts": name -> {"found": {name: value}, "skipped": [name],
            "notes": [text], "seconds": of all its tasks}. A value with the key "failed" is a reason.
    """

    def __init__(self, file: Path):
        self.file = file
        self.data: dict[str, Any] = {"about": {}, "parts": {}}
        self.read()

    def read(self) -> None:
        """Take what another process has written."""
        if self.file.is_file():
            self.data = json.loads(self.file.read_text())

    def part(self, name: str, anew: bool = False) -> dict[str, Any]:
        """The entry of a part, made where there is none."""
        if anew or name not in self.data["parts"]:
            self.data["parts"][name] = {"found": {}, "skipped": [], "notes": [], "seconds": 0.0}
        return self.data["parts"][name]

    def save(self) -> None:
        """Write the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.file)


class Bench:
    """What a task measures with.

    Args:
        record: Where to.
        part: Name of the part.
        box: The task's time.
    """

    def __init__(self, record: Record, part: str, box: Box):
        self.record, self.part, self.box = record, part, box

    def measure(self, name: str, function: Callable[[], Any], needs: float = 0.0) -> Any:
        """Call a function and record what it returns, or why it failed; skip it where fewer than `needs` s are left.

        Returns:
            The value, {"failed": reason}, or None where it was skipped.
        """
        entry = self.record.part(self.part)
        if self.box.left <= needs:
            entry["skipped"].append(name)
            value = None
        else:
            value = entry["found"][name] = attempt(function)
        self.record.save()
        return value

    def note(self, text: str) -> None:
        """Record a sentence."""
        self.record.part(self.part)["notes"].append(text)
        self.record.save()


class Task(NamedTuple):
    """One process of a part.

    Attributes:
        name: In the record, where it fails as a whole or is skipped.
        run: What it does.
        share: Of the part's time that is left, in (0, 1]: what it may take. least: seconds without which it is skipped.
    """

    name: str
    run: Callable[[Bench], None]
    share: float = 1.0
    least: float = 0.0


def attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or {"failed": reason}; whatever an exception held of the GPU is free again."""
    try:
        return function()
    except Exception as error:  # of compilers, drivers, kernels: any
        traceback.print_exc()
        found = {"failed": reason(error)}
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return found


def failed(value: Any) -> bool:
    """Whether a measurement ended in an exception."""
    return isinstance(value, dict) and "failed" in value


def reason(error: BaseException, length: int = 200) -> str:
    """An exception as one line, without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(?<![\w.:/])/[\w./+-]+", lambda match: "/".join(match[0].split("/")[-2:]), " ".join(lines[:2]))
    text = f"{type(error).__name__}: {text}".rstrip(": ").replace("|", "/")  # it may stand in a table
    return text if len(text) <= length else text[: length - 3] + "..."


def run_apart(function: Callable[[], None], seconds: float) -> str:
    """Run a function in a forked process; "" or, where it did not come to its end, why."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return f"stopped after {seconds:.0f} s"
    return f"ended with status {process.exitcode}" if process.exitcode else ""


def _run(task: Task, bench: Bench) -> None:
    found = attempt(lambda: task.run(bench))
    if failed(found):
        bench.record.part(bench.part)["found"][task.name] = found
        bench.record.save()


def run_part(record: Record, name: str, tasks: list[Task], box: Box, grace: float = GRACE) -> None:
    """Run the tasks of a part, one after the other, within its time; what does not fit is noted as skipped.

    Args:
        record: Where their results are found afterwards; those of an earlier run of the part are forgotten.
        name: Of the part.
        tasks: In their order.
        box: The part's time.
        grace: Seconds that a task may outlast its time before it is stopped.
    """
    record.part(name, anew=True)
    record.save()
    start = box.clock()
    for task in tasks:
        own = box.inner(task.share * box.left)
        if own.left <= task.least:
            record.part(name)["skipped"].append(task.name)
            continue
        end = run_apart(partial(_run, task, Bench(record, name, own)), own.left + grace)
        record.read()
        if end:
            record.part(name)["found"][task.name] = {"failed": end}
        record.save()
    record.part(name)["seconds"] = round(box.clock() - start, 1)
    record.save()
