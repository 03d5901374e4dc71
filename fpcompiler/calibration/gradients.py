"""Squared gradients at the outputs of layers: how much an error there changes the model's output.

LLM-FP4 (arXiv 2310.16836, section 3.1) weights the squared error of each output with the squared
gradient of the task's loss, which stands for the Fisher information. There are no labels here, so
the loss is the squared change of the model's output: ``g = J^T v`` for random ``v`` of variance 1
has ``E[g**2]`` equal to the diagonal of ``J^T J``, where ``J`` is the derivative of the model's
output with respect to the output of the layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from fpcompiler.calibration.float_graph import raise_without_quantization
from fpcompiler.calibration.statistics import draw
from fpcompiler.errors import RunError
from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import text_of

_PROJECTIONS: Final = 4
"""Random directions for each batch; their squared gradients are averaged."""


class SquaredGradients:
    """Squared gradients at sampled tokens, computed for all layers at once and kept on disk.

    The whole model runs with its derivatives, one batch at a time: memory is that of the batch's
    activations, which a budget for statistics cannot bound.

    Args:
        program: A program at stage ``quantized``.
        folder: For the results, a file for each batch. Those that are there are not computed again.
        batches: As of :class:`fpcompiler.calibration.Calibration`.
        quotas: Tokens to keep of each batch.
        seed: Of the draws of tokens and of directions.
        device: Where the model runs.
    """

    def __init__(
        self,
        program: Program,
        folder: Path,
        batches: Sequence[tuple[Tensor, ...]],
        quotas: Sequence[int],
        seed: int,
        device: torch.device,
    ) -> None:
        self._folder = folder
        self._batches = batches
        self._quotas = quotas
        self._seed = seed
        self._device = device
        layers = program.operations("fpq.linear")
        self._module, nodes = raise_without_quantization(
            program, [layer.results[0] for layer in layers]
        )
        self._layers: dict[fx.Node, str] = {}
        for layer, node in zip(layers, nodes, strict=True):
            # Of a layer that is called twice the first call counts, as for its input.
            if text_of(layer.attributes["layer"]) not in self._layers.values():
                self._layers[node] = text_of(layer.attributes["layer"])

    def compute(self, batch: int) -> None:
        """Compute what a batch gives, unless it is there.

        Raises:
            RunError: If the model cannot run on the batch, or has no derivative.
        """
        if self._path(batch).exists():
            return
        squares: dict[str, Tensor] = {}
        taps = {
            node: partial(self._add, squares, name, batch) for node, name in self._layers.items()
        }
        with torch.enable_grad():
            outputs = self._outputs(batch, taps)
            self._differentiate(batch, outputs)
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._path(batch).with_suffix(".tmp")
        save_file(squares, unfinished)
        os.replace(unfinished, self._path(batch))

    def of(self, layer: str) -> Tensor:
        """Return the mean squared gradients at a layer's sampled tokens, fp32 ``[S, N]``.

        The tokens are those of the sample of the layer's input, in the same order. A layer that
        does not change the model's output has zeros.
        """
        parts = []
        for batch in range(len(self._batches)):
            with safe_open(self._path(batch), framework="pt", device=str(self._device)) as file:
                parts.append(file.get_tensor(layer))
        return torch.cat(parts)

    def _outputs(
        self, batch: int, taps: Mapping[fx.Node, Callable[[Tensor], None]]
    ) -> list[Tensor]:
        """Return the model's outputs that have derivatives."""
        tensors = [tensor.to(self._device) for tensor in self._batches[batch]]
        try:
            outputs = _tensors(_Tapped(self._module, taps).run(*tensors))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise RunError(
                f"calibration batch {batch}: the model cannot run on it: {_first_line(error)}. "
                "Compare the batch with the inputs that the model takes."
            ) from error
        return [o for o in outputs if o.is_floating_point() and o.requires_grad]

    def _differentiate(self, batch: int, outputs: Sequence[Tensor]) -> None:
        """Run backwards from the outputs in each random direction."""
        generator = torch.Generator().manual_seed(self._seed + batch)
        for number in range(_PROJECTIONS if outputs else 0):
            directions = [
                torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
                for output in outputs
            ]
            try:
                torch.autograd.backward(outputs, directions, retain_graph=number + 1 < _PROJECTIONS)
            except (RuntimeError, NotImplementedError) as error:
                raise RunError(
                    "the Fisher objective needs the model's derivatives, which cannot be computed: "
                    f"{_first_line(error)}. Use objective=mse."
                ) from error

    def _add(self, squares: dict[str, Tensor], name: str, batch: int, value: Tensor) -> None:
        """Have the gradient at a value added to what is kept for a layer."""
        rows = value.shape[:-1].numel()
        chosen = draw(rows, self._quotas[batch], self._seed, batch).to(value.device)
        squares[name] = torch.zeros(len(chosen), value.shape[-1])

        def hook(gradient: Tensor) -> None:
            taken = gradient.reshape(rows, -1)[chosen].float()
            squares[name] += (taken.square() / _PROJECTIONS).cpu()

        value.register_hook(hook)  # type: ignore[no-untyped-call]

    def _path(self, batch: int) -> Path:
        return self._folder / f"gradients-{batch:05}.safetensors"


class _Tapped(fx.Interpreter):
    """Runs a graph and shows the values of some nodes, which have gradients then."""

    def __init__(
        self, module: fx.GraphModule, taps: Mapping[fx.Node, Callable[[Tensor], None]]
    ) -> None:
        super().__init__(module)
        self._taps = taps

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        tap = self._taps.get(n)
        if tap is None:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        tap(value)
        return value


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return (
        [t for value in values for t in _tensors(value)] if isinstance(values, list | tuple) else []
    )


def _first_line(error: Exception) -> str:
    """Return the cause; what comes after it is about the graph."""
    return str(error).partition("\n")[0]
