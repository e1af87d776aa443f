"""Files that are there whole or not at all, whoever writes and whatever is killed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

OLD = 3600.0  # seconds after which a file that is still not renamed was left by a killed process


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under a name of this process alone, also on a disk of several machines, and renames it when whole.

    Args:
        file: The last of several writers wins.
        write: Writes to the path that it is given.
    """
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())  # else a crash may leave the name of a file without its content
        os.replace(temporary, file)
    except FileNotFoundError:
        if not file.is_file():
            raise
        # another job has completed the folder and removed what it took for left over
    finally:
        temporary.unlink(missing_ok=True)


def remove_old(folder: Path) -> None:
    """Removes temporary files that killed processes left, of whatever machine: those not written to for an hour."""
    for left in folder.glob("*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > OLD:
                left.unlink()
        except FileNotFoundError:
            continue
