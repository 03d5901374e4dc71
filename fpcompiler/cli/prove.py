"""``fpcompiler prove``: check compiled kernels without the GPU that they are for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import FAILED, OK, Command
from fpcompiler.cli.output import print_json, print_table, progress
from fpcompiler.cli.prove_artifact import WHY_NOT_PACKED
from fpcompiler.errors import OptionError, TargetError

if TYPE_CHECKING:
    from fpcompiler.codegen.kernel import BuiltKernel
    from fpcompiler.options import Options

__all__ = ["COMMAND"]

_HEADERS: Final = ("level", "check", "outcome", "controls", "found")
_SIZES: Final = (4096, 4096)  # M, N and K are arguments of a kernel: any will do


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", help="an artifact, whose kernels are checked; by default a new kernel"
    )
    parser.add_argument(
        "--target",
        metavar="ARCH",
        help="an architecture, such as sm_100a; of a file, by default all",
    )
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="show what the file says was checked when it was compiled, and check nothing",
    )
    parser.add_argument(
        "--scheme", default="nvfp4", help="of a new kernel: name or exact text; by default nvfp4"
    )
    parser.add_argument(
        "--rows", choices=("decode", "prefill"), default="prefill",
        help="of a new kernel: for up to 128 rows, or for more; by default prefill",
    )  # fmt: skip
    parser.add_argument(
        "--level", action="append", dest="levels", metavar="LEVEL",
        help="of a new kernel: a level of proof, L0 to L6, to be repeated; by default all",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="write all records as JSON")
    parser.add_argument("--json", action="store_true", help="print all records as JSON")


def _run(args: argparse.Namespace) -> int:
    if args.file is not None:
        from fpcompiler.cli.prove_artifact import proved, recorded

        records = (
            recorded(args.file, args.target) if args.recorded else proved(args.file, args.target)
        )
    else:
        records = [_new_kernel(args)]
    whole = records if args.file is not None else records[0]
    if args.output:
        Path(args.output).write_text(f"{json.dumps(whole, indent=1)}\n", encoding="utf-8")
    if args.json:
        print_json(whole)
    else:
        for record in records:
            _print(record)
        print("What this does not show: that kernels give these results on a GPU, and how fast.")
    return OK if all(record["passed"] for record in records) else FAILED


def _new_kernel(args: argparse.Namespace) -> dict[str, Any]:
    from fpcompiler.codegen.proof.prove import LEVELS, prove, require_levels
    from fpcompiler.options import Options

    if args.target is None or args.recorded:
        raise OptionError("give an artifact, or --target and a scheme for a new kernel.")
    levels = tuple(args.levels or LEVELS)
    require_levels(levels)  # before a minute of compiling
    options = Options.from_env()
    with progress(f"a kernel of {args.scheme} for {args.target}"):
        return prove(_kernel(args, options), levels, options).to_json()


def _kernel(args: argparse.Namespace, options: Options) -> BuiltKernel:
    """Return the kernel of a layer with the scheme's operands, compiled if it is not there."""
    from fpcompiler.codegen.build import KernelCache
    from fpcompiler.codegen.cutlass import choose, emit
    from fpcompiler.codegen.hopper import packed_gemm
    from fpcompiler.codegen.legalize import legalize
    from fpcompiler.codegen.problem import OutputType, Rows
    from fpcompiler.scheme import Scheme

    base = Scheme.of(args.scheme).base
    if base.weight is None:
        raise OptionError(f"the scheme {args.scheme} leaves weights as they are.")
    if packed_gemm(base.weight, base.activation, args.target, OutputType.BF16):
        raise TargetError(
            f"{args.scheme} on {args.target}: {WHY_NOT_PACKED} compile a model and run "
            "`fpcompiler selftest` on its artifact."
        )
    problem = legalize("", base.weight, base.activation, _SIZES, args.target, rows=Rows(args.rows))
    return KernelCache.from_options(options).build(emit(choose([problem])[problem]))


def _print(record: dict[str, Any]) -> None:
    rows = [
        (
            check["level"], check["name"], check["outcome"], _controls(check["controls"]),
            "; ".join(check["findings"]) or check["detail"],
        )
        for check in record["checks"]
    ]  # fmt: skip
    print_table(record["kernel"], _HEADERS, rows)
    outcomes = [check["outcome"] for check in record["checks"]]
    counts = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if not record.get("of_the_file", True):
        print("This kernel was compiled again here; its bytes are not those of the file.")


def _controls(controls: dict[str, bool]) -> str:
    return f"{sum(controls.values())} of {len(controls)} red" if controls else ""


COMMAND: Final = Command(
    "prove",
    "check GPU kernels without a GPU: bytes, launch, machine code",
    "  fpcompiler prove model.fpc --target sm_100a\n"
    "  fpcompiler prove --target sm_100a --scheme nvfp4\n"
    "  fpcompiler prove --target sm_120a --scheme w4a6 --level L2 --level L3 -o proof.json",
    _add_arguments,
    _run,
)
