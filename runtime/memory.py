"""How much memory the process takes, as the system counts it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Memory while a model was called, in bytes; None where the system does not tell.

    Weights that are mapped from the file count from the first call on, which reads them.

    Attributes:
        before: Resident memory of the process before the first call.
        after: The same after the last one.
        peak: The largest it was, or None.
        peak_of_calls: Whether ``peak`` is that of the calls; otherwise it is that of the process
            since its start, because the system does not let it be reset.
        device_peak: The most that torch held on the CUDA device, or None on the CPU.
        loading: How much it grew before, when the model was loaded; None if that was not seen.
    """

    before: int | None
    after: int | None
    peak: int | None
    peak_of_calls: bool
    device_peak: int | None = None
    loading: int | None = None

    @property
    def growth(self) -> int | None:
        """How much larger the peak was than the memory before."""
        if self.peak is None or self.before is None:
            return None
        return self.peak - self.before


class MemoryMeter:
    """Watches the memory from when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restarted = _restart_peak()
        self._before = _status("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> Memory:
        """Return what was seen until now."""
        cuda = self._device.type == "cuda"
        on_device = torch.cuda.max_memory_allocated(self._device) if cuda else None
        after, peak = _status("VmRSS"), _status("VmHWM")
        return Memory(self._before, after, peak, self._restarted, on_device)


def resident_bytes() -> int | None:
    """Return the resident memory of the process; None where the system does not tell."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _restart_peak() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True
