"""How many compilers run at once: as many as memory holds, of all processes with one cache."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["slot", "slot_count", "available_memory", "locked", "NVCC_BYTES"]

NVCC_BYTES: Final = 6_500_000_000
"""Memory that one nvcc may need; a kernel for sm_120a took 6.1 GB (nvcc 13.0)."""

_CGROUP: Final = Path("/sys/fs/cgroup")
_WAIT: Final = 0.1


def slot_count(total_bytes: int) -> int:
    """Return how many compilers fit into memory; at least one."""
    return max(1, total_bytes // NVCC_BYTES)


def available_memory(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Return the bytes of memory that this process may use, and how many of them are free.

    The smaller of what the machine and what the control group has (containers see the machine's).
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (s.split(":") for s in lines)}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return total, free
    return min(total, limit), min(free, limit - used)


@contextlib.contextmanager
def slot(folder: Path) -> Iterator[None]:
    """Wait until memory has room for one more compiler, and keep that room.

    Each slot is a locked file, so that it is free again however its process ends.

    Args:
        folder: Where the files of the slots are; processes with the same folder share them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        total, _ = available_memory()
        for index in range(slot_count(total)):
            with (folder / f"slot-{index}").open("w") as file:
                # The first slot needs no free memory: something must run, or all wait forever.
                if _try_lock(file.fileno()) and (index == 0 or _has_room()):
                    yield
                    return
        time.sleep(_WAIT)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; waits for other threads and processes that hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _has_room() -> bool:
    _, free = available_memory()
    return free >= NVCC_BYTES


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _number(path: Path) -> int | None:
    """Return the number in a file of a control group; None for no file and for ``max``."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
