"""Where quantizers note NaN and infinity: each thread has flags of its own.

Kernels set a flag and nobody waits for them; the flags are read when a run has ended. If threads
that run one model shared them, one could read what another had set. A recorded graph writes to
those it was recorded with, which are read after each replay: replays take turns. What torch.compile
has traced names one tensor for all threads: there the error may reach another thread that runs the
model at the same time.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

_KINDS: Final = ("plain", "recorded")


class _Set(NamedTuple):
    """Flags, and each of them as a tensor of its own."""

    whole: Tensor
    parts: tuple[Tensor, ...]

    @classmethod
    def new(cls, count: int, device: torch.device) -> _Set:
        whole = torch.zeros(count, dtype=torch.int32, device=device)
        return cls(whole, tuple(whole[i : i + 1] for i in range(count)))


@final
class Flags:
    """One flag for each quantizer of a program, int32.

    Args:
        count: How many quantizers there are.
        device: Where they run.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._traced = _Set.new(count, device)
        self._own = threading.local()

    def whole(self) -> Tensor | None:
        """Return the flags that a run of this thread sets now, ``[count]``.

        None while torch.compile traces: what is traced would return what it writes parts of.
        :attr:`traced` are those.
        """
        return None if torch.compiler.is_compiling() else self._here().whole

    @property
    def traced(self) -> Tensor:
        """The flags that what torch.compile made sets, ``[count]``."""
        return self._traced.whole

    def part(self, place: int) -> Tensor:
        """Return one of them, ``[1]``."""
        return self._here().parts[place]

    def _here(self) -> _Set:
        if torch.compiler.is_compiling():
            return self._traced
        recording = is_capturing(self._device)
        own: _Set | None = getattr(self._own, _KINDS[recording], None)
        return own or self._new(recording)

    def _new(self, recording: bool) -> _Set:
        if recording:
            # A graph of somebody else: what is made here is made again by each replay.
            return _Set.new(self._count, self._device)
        for kind in _KINDS:
            setattr(self._own, kind, _Set.new(self._count, self._device))
        own: _Set = getattr(self._own, _KINDS[0])
        return own


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of a device is recorded."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
