"""``fpcompiler run``: run an artifact on inputs from a file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import OK, STRICT_HELP, TRUST_HELP, Command
from fpcompiler.cli.model import FILE_HELP, load_file
from fpcompiler.cli.output import print_json, print_table, progress
from fpcompiler.cli.tensors import Inputs, file_kind, named_tensors, read_inputs, write_tensors
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    import torch

    from fpcompiler.runtime.model import CompiledModel
    from fpcompiler.runtime.onnx_model import OnnxModel

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=FILE_HELP)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--inputs", metavar="FILE", help="the call as .safetensors or .npz")
    inputs.add_argument(
        "--random",
        action="store_true",
        help="make up a call like the recorded one: random numbers, its integers shuffled",
    )
    parser.add_argument("--output", metavar="FILE", help="the results as .safetensors or .npz")
    parser.add_argument("--device", default="cpu", help="by default cpu")
    parser.add_argument("--strict", action="store_true", help=STRICT_HELP)
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="add in fp64 what torch adds: for w4a6-row, the same bits on other machines; slower",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    if args.output:
        file_kind(args.output)  # Before the work, not after it.
    with progress("running"):
        compiled = load_file(args.file, args.device, args.strict, args.trust, args.reproducible)
        inputs = read_inputs(args.inputs) if args.inputs else _made_up_call(compiled)
        inputs = inputs.to(compiled.device)
        result = compiled(*inputs.args, **inputs.kwargs)
    if args.output:
        write_tensors(args.output, result)
    outputs = [_describe(name, tensor) for name, tensor in named_tensors(result)]
    if args.json:
        print_json(outputs)
    else:
        print_table("outputs", tuple(outputs[0]), [list(output.values()) for output in outputs])
    return OK


def _made_up_call(model: CompiledModel | OnnxModel) -> Inputs:
    """Return a call with the shapes of the recorded one, the same at each run."""
    import torch

    from fpcompiler.runtime.inputs import named
    from fpcompiler.runtime.model import CompiledModel

    if not isinstance(model, CompiledModel):
        raise OptionError("--random needs the recorded call of an artifact; give --inputs.")
    artifact = model.artifact
    if not artifact.golden:
        raise OptionError("no call was recorded in this artifact; give one with --inputs.")
    generator = torch.Generator().manual_seed(0)
    leaves = [_like(tensor, generator) for tensor in artifact.golden[0].inputs]
    return Inputs((), named(artifact.plan.signature, leaves))


def _like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    # Token numbers, positions and masks have ranges that only the recorded values tell.
    order = torch.randperm(tensor.numel(), generator=generator)
    return tensor.flatten()[order].reshape(tensor.shape)


def _describe(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.detach().double()
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "mean": values.mean().item() if tensor.numel() else 0.0,
        "largest": values.abs().amax().item() if tensor.numel() else 0.0,
    }


COMMAND: Final = Command(
    "run",
    "run an artifact on inputs from a file",
    "  fpcompiler run model.fpc --inputs in.safetensors --output out.safetensors\n"
    "  fpcompiler run model.fpc --random\n\n"
    "Tensors named 0, 1, ... (or arg0, arr_0) are positional arguments, others are passed by name.",
    _add_arguments,
    _run,
)
