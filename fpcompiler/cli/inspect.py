"""``fpcompiler inspect``: what an artifact, or an ONNX file made of one, holds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.kernels import HEADERS, kernel_reasons, kernel_rows
from fpcompiler.cli.model import FILE_HELP, ONNX
from fpcompiler.cli.output import print_json, print_rich, print_table
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    from fpcompiler.artifact import Artifact
    from fpcompiler.plan import Plan
    from fpcompiler.runtime.explain import ExplainTable
    from fpcompiler.runtime.tables import PlanTable

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=FILE_HELP)
    parser.add_argument(
        "--gpu",
        metavar="GPU",
        help="predict the time of each layer on it, such as sm_90a; by default on the first GPU "
        "that the model was compiled for",
    )
    parser.add_argument(
        "--tokens",
        metavar="M,M",
        help="for these numbers of tokens; by default 1,16,2048",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler import artifact as artifacts
    from fpcompiler.runtime.tables import PlanTable

    if args.file.endswith(ONNX):
        return _onnx(args)
    artifact = artifacts.read(args.file)
    plan = PlanTable.of(artifact.plan.layers, artifact.scheme)
    times = _explained(artifact, args.gpu, args.tokens)
    facts = _facts(artifact, Path(args.file).stat().st_size)
    if args.json:
        kernels = [dict(zip(HEADERS, row, strict=True)) for row in kernel_rows(artifact.kernels)]
        rest: dict[str, Any] = {"inputs": _inputs(artifact.plan), "plan": plan.to_json()}
        rest |= {"kernels": kernels, "times": times.to_json() if times else None}
        print_json({**facts, **rest})
        return OK
    _print(args.file, facts, artifact.plan, plan)
    if times:
        print_rich(times)
    if artifact.kernels:
        print_table("GPU kernels", HEADERS, kernel_rows(artifact.kernels))
    reasons = kernel_reasons(artifact.kernels)
    if reasons:
        print_table("layers without GPU kernels", ("GPU", "layer", "reason"), reasons)
    return OK


def _explained(artifact: Artifact, gpu: str | None, tokens: str | None) -> ExplainTable | None:
    """Return predicted times, if a GPU was named here or when the model was compiled."""
    from fpcompiler.runtime.costs import GPUS
    from fpcompiler.runtime.explain import TOKENS, explain

    if gpu is None and tokens is None and not {*artifact.targets} & {*GPUS}:
        return None
    try:
        numbers = [int(part) for part in tokens.split(",")] if tokens is not None else TOKENS
    except ValueError:
        raise OptionError(f"--tokens {tokens} must be numbers with commas: 1,16,2048.") from None
    return explain(artifact, gpu, numbers)


def _onnx(args: argparse.Namespace) -> int:
    from fpcompiler.interop.onnx.read import read_facts
    from fpcompiler.interop.onnx.write import require_packages
    from fpcompiler.runtime.onnx_model import GOLDEN_SUFFIX
    from fpcompiler.runtime.tables import PlanTable

    require_packages()
    found = read_facts(Path(args.file))
    plan = PlanTable.of(found.plan.layers, found.scheme)
    facts = {
        "scheme": found.scheme,
        "style": found.style,
        "bytes": Path(args.file).stat().st_size,
        "recorded_calls": len(found.noise) if Path(args.file + GOLDEN_SUFFIX).exists() else 0,
    }
    if args.json:
        print_json({**facts, "inputs": _inputs(found.plan), "plan": plan.to_json()})
    else:
        _print(args.file, facts, found.plan, plan)
    return OK


def _print(file: str, facts: Mapping[str, Any], program: Plan, plan: PlanTable) -> None:
    print_table(file, ("", ""), [(name, _text(value)) for name, value in facts.items()])
    rows = [(name, dtype, " x ".join(map(str, shape))) for name, dtype, shape in _inputs(program)]
    print_table("inputs", ("name", "dtype", "shape"), rows)
    print_rich(plan)


def _facts(artifact: Artifact, size: int) -> dict[str, Any]:
    state = {*artifact.plan.state.values()}
    sizes = {name: tensor.nbytes for name, tensor in artifact.tensors.items()}
    return {
        "scheme": artifact.scheme,
        "method": artifact.recipe.get("method"),
        "attention": artifact.recipe.get("attention"),
        "effective_bits": artifact.recipe.get("effective_bits"),
        "targets": list(artifact.targets),
        "pipeline": artifact.pipeline,
        "packages": dict(artifact.packages),
        "bytes": size,
        "weight_bytes": sum(nbytes for name, nbytes in sizes.items() if name not in state),
        "state_bytes": sum(nbytes for name, nbytes in sizes.items() if name in state),
        "steps": len(artifact.plan.steps),
        "recorded_calls": len(artifact.golden),
    }


def _inputs(plan: Plan) -> list[tuple[str, str, list[int | str]]]:
    return [(p.name, p.dtype, list(p.shape)) for p in plan.placeholders]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


COMMAND: Final = Command(
    "inspect",
    "show the scheme, the plan and the sizes of an artifact",
    "  fpcompiler inspect model.fpc\n"
    "  fpcompiler inspect model.fpc --gpu sm_90a --tokens 1,512\n"
    "  fpcompiler inspect model.fpc --json | jq '.plan.rows[].name'",
    _add_arguments,
    _run,
)
