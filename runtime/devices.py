"""Where a program runs."""

from __future__ import annotations

import torch

from fpcompiler.errors import OptionError


def parse_device(device: str | torch.device) -> torch.device:
    """Return the device that a text names, if it is there.

    Raises:
        OptionError: If it is no device, or a CUDA device that torch does not find here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f"{device!r} is no device; write cpu, cuda or cuda:0.") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"torch finds {torch.cuda.device_count()} CUDA devices here, so {str(found)!r} cannot "
            "be used. Run `fpcompiler doctor` to see why, or use the CPU."
        )
    return found
