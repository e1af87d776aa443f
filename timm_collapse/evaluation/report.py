"""Measured tables: each command writes its own section of docs/results.md and the numbers as JSON beside it."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("docs/results.md")


def hardware() -> str:
    """Class of the hardware, e.g. "2 CPU cores (x86_64)" or a GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({platform.machine()})"


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "|".join("---" for _ in keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows])


def write_section(name: str, title: str, text: str, data: dict[str, Any], results: Path = RESULTS) -> None:
    """Replace (or append) one section of the results page, and write `<name>.json` beside it.

    Args:
        name: Identifier of the section and name of the JSON file.
        title: Heading.
        text: Markdown: tables and what they show.
        data: The numbers, JSON-serialisable; "command", "hardware" and "torch" are added where it does not name them.
        results: The page.
    """
    command = data.get("command") or shlex.join(["python", *(relative_paths(argument) for argument in sys.argv)])
    machine = data.get("hardware") or hardware()
    results.parent.mkdir(parents=True, exist_ok=True)
    body = f"<!-- {name} -->\n## {title}\n\n{text}\n\nCommand: `{command}`; {machine}.\n<!-- end {name} -->\n"
    page = results.read_text() if results.exists() else "# Results\n\nWritten by the commands that measure.\n\n"
    pattern = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->\n", re.DOTALL)
    page = pattern.sub(lambda _: body, page) if pattern.search(page) else page.rstrip("\n") + "\n\n" + body
    results.write_text(page)
    facts = {"command": command, "hardware": machine, "torch": torch.__version__}
    (results.parent / f"{name}.json").write_text(json.dumps({**facts, **data}, indent=1) + "\n")


def read_section(name: str, results: Path = RESULTS) -> str:
    """The markdown of one section of the results page, without its heading; "" where there is none."""
    page = results.read_text(encoding="utf-8") if results.is_file() else ""
    found = re.search(
        rf"<!-- {re.escape(name)} -->\n## [^\n]*\n+(.*?)\n<!-- end {re.escape(name)} -->", page, re.DOTALL
    )
    return found[1] if found else ""


def without_paths(value: Any) -> Any:
    """`relative_paths` of every string in a value, also in lists, dicts and strings of JSON."""
    if isinstance(value, str):
        if value[:1] in ("{", "["):
            try:
                return json.dumps(without_paths(json.loads(value)))
            except ValueError:
                pass
        return relative_paths(value)
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    return [without_paths(each) for each in value] if isinstance(value, list | tuple) else value


def relative_paths(argument: str) -> str:
    """Absolute paths are those of one machine: their last two parts; also behind `name=` and in lists with , or +."""
    name, equals, paths = argument.rpartition("=")
    return name + equals + re.sub(r"[^,+]+", lambda match: _shortened(match[0]), paths)


def _shortened(path: str) -> str:
    if "://" in path:
        return path
    scheme, bare = re.fullmatch(r"(.*:|\w+/(?=/)|)(.*)", path, re.DOTALL).groups()  # local-dir:/..., wds//...
    return scheme + "/".join(Path(bare).parts[-2:]) if bare.startswith(("/", "..")) else path
