"""Agreement: does the compiled model give what the original gives on the same inputs?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation.base import Direction, Model, Program, Result, Task, Track, without_bar
from fpcompiler.evaluation.calls import NAN_HINT, call, device_of, one_program, select_output
from fpcompiler.runtime.compare import Batch, call_arguments

__all__ = ["Agreement", "FeatureAgreement", "mean_cosine"]


@dataclass(frozen=True, eq=False)
class _AgainstOriginal(Task):
    """A task whose result is a distance to the original model, which itself scores 1.

    Attributes:
        batches: The calls: each a tensor, a tuple of arguments, or a dict of keyword arguments.
        output: Name or number of the output; see :func:`fpcompiler.evaluation.calls.select_output`.
        original: What is compared with; set by :meth:`against`.
    """

    direction: ClassVar[Direction] = Direction.HIGHER
    batches: Sequence[Batch]
    output: str | None = None
    original: Model | None = None

    def against(self, original: Model) -> Self:
        """Return the task that compares with an original model."""
        return replace(self, original=original)

    def run(self, model: Model, progress: Track = without_bar) -> Result:
        """Return the means over all rows, and how many rows there are."""
        if self.original is None:
            raise OptionError(
                f"the task {self.name} compares with the original model, and none was given: "
                "task.against(model), or --against on the command line."
            )
        if not self.batches:
            raise OptionError(f"the task {self.name} has no inputs to compare on.")
        batches = progress(self.batches, len(self.batches), "batches")
        rows = [self.rows(*pair) for pair in self._outputs(model, self.original, batches)]
        metrics = {name: float(torch.cat([row[name] for row in rows]).mean()) for name in rows[0]}
        return Result(metrics, self.direction, sum(len(row[self.metric]) for row in rows), "rows")

    @abstractmethod
    def rows(self, reference: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """Return the metrics of each row [rows] of two outputs [rows, width], in fp64."""

    def _outputs(
        self, model: Model, original: Model, batches: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        programs = one_program(original), one_program(model)
        for index, batch in enumerate(batches):
            reference = self._output(programs[0], batch, f"original model, batch {index}")
            if model is original:
                yield reference, reference
                continue
            value = self._output(programs[1], batch, f"batch {index}").to(reference.device)
            if value.shape != reference.shape:
                shapes = f"{list(reference.shape)} and {list(value.shape)}"
                raise OptionError(f"batch {index}: the outputs have {shapes} as [rows, width].")
            yield reference, value

    def _output(self, program: Program, batch: Batch, where: str) -> Tensor:
        device = device_of(program)
        args, kwargs = call_arguments(_moved(batch, device))
        value = select_output(call(program, *args, **kwargs), self.output).double()
        if value.ndim < 2:
            raise OptionError(f"{where}: the output has shape {list(value.shape)}, not [rows, n].")
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise NumericsError(
                f"{where}: {count} of {value.numel()} values of the output "
                f"{self.output or 'of the model'} are NaN or infinite. {NAN_HINT}"
            )
        return value.flatten(0, -2)


@final
@dataclass(frozen=True, eq=False)
class Agreement(_AgainstOriginal):
    """Agreement of a classifier's logits [..., classes] with those of the original.

    ``top1``: how often the likeliest class is the same. ``top5``: how often the original's
    likeliest class is among the five likeliest. ``cosine``: mean cosine of the logits.
    """

    name: ClassVar[str] = "agreement"
    metric: ClassVar[str] = "top1"

    def rows(self, reference: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """Return the three metrics of each row of logits [rows, classes]."""
        wanted = reference.argmax(-1, keepdim=True)
        best = value.topk(min(5, value.shape[-1])).indices
        return {
            "top1": (best[:, :1] == wanted).any(-1).double(),
            "top5": (best == wanted).any(-1).double(),
            "cosine": nnf.cosine_similarity(reference, value, dim=-1),
        }


@final
@dataclass(frozen=True, eq=False)
class FeatureAgreement(_AgainstOriginal):
    """Mean cosine of feature vectors [..., width] with those of the original."""

    name: ClassVar[str] = "features"
    metric: ClassVar[str] = "cosine"

    def rows(self, reference: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """Return the cosine of each row of features [rows, width]."""
        return {"cosine": nnf.cosine_similarity(reference, value, dim=-1)}


def mean_cosine(reference: Tensor, value: Tensor) -> float:
    """Return the mean cosine of vectors [..., width], for instance of the tokens of patches."""
    return float(nnf.cosine_similarity(reference.double(), value.double(), dim=-1).mean())


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device)
    if isinstance(value, Mapping):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(entry, device) for entry in value)
    return value
