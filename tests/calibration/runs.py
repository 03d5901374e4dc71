"""Calibration of the test models: programs, batches, and what hooks on the model itself see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpcompiler import ir
from fpcompiler.calibration import Calibration, Group, InputStatistics, input_groups
from fpcompiler.streams import Result
from tests.models import Call
from tests.programs import import_named, leaves_of, run_passes

CPU = torch.device("cpu")


def silent(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """Show no progress."""
    return items


def program_for(captured: Any, scheme: str = "w4a6,skip=none") -> ir.Program:
    """Return a captured program at stage quantized."""
    program = import_named(captured)
    run_passes(program, f'cse,normalize,fold-constants,insert-quantize{{scheme="{scheme}"}},cse')
    return program


def batches_for(captured: Any, calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """Return calls as batches."""
    return [tuple(leaves_of(captured, call)) for call in calls]


def keep(group: Group, statistics: InputStatistics) -> Result:
    """Work that returns the statistics."""
    return {
        "tokens": torch.tensor(statistics.tokens),
        "amax": statistics.amax,
        "gram": statistics.gram,
        "sample": statistics.sample,
    }


def visit(
    program: ir.Program,
    calibration: Calibration,
    work: Callable[[Group, InputStatistics], Result] = keep,
    label: str = "keep",
) -> dict[str, Result]:
    """Visit every group of a program."""
    with program.context():
        groups = input_groups(program)
        return calibration.visit(program, groups, work, label=label, progress=silent)


def equal(a: dict[str, Result], b: dict[str, Result]) -> bool:
    """Return whether two visits gave the same bits."""
    return list(a) == list(b) and all(
        list(a[name]) == list(b[name])
        and all(torch.equal(a[name][key], b[name][key]) for key in a[name])
        for name in a
    )


def hooked(
    model: nn.Module, names: Iterable[str], calls: Sequence[Call]
) -> dict[str, list[Tensor]]:
    """Return the rows that each layer reads, a tensor for each batch."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].detach().flatten(0, -2))
        )
        for name in seen
    ]
    with torch.no_grad():
        for args, kwargs in calls:
            model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen
