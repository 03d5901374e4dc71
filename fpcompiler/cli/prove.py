"""``fpcompiler prove``: check the GPU kernels of an artifact without the GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import FAILED, OK, Command
from fpcompiler.cli.output import print_json, print_table, progress
from fpcompiler.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    from fpcompiler.artifact.kernels import Instance, KernelIndex
    from fpcompiler.codegen.kernel import BuiltKernel

__all__ = ["COMMAND"]

_HEADERS: Final = ("level", "check", "outcome", "controls", "found")
_EXAMPLE: Final = """\
  fpcompiler prove model.fpc --target sm_100a
  fpcompiler prove model.fpc --recorded --json

Kernels that were not compiled on this machine are compiled again, which needs nvcc. Each check has
controls, which are wrong on purpose: it passes only if it notices all of them. Nothing of this runs
a kernel; on a GPU, fpcompiler selftest does."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an artifact with kernels")
    parser.add_argument("--target", help="one of its GPUs; by default all of them")
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="show what was recorded when the model was compiled, and check nothing",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler import artifact as artifacts
    from fpcompiler.artifact.kernels import KernelIndex

    artifact = artifacts.read(args.file)
    gemms = _gemms(KernelIndex.of(artifact.kernels), args.file, args.target)
    if args.recorded:
        records = [_recorded(instance, artifact.kernels) for instance in gemms]
    else:
        records = [_proved(instance) for instance in gemms]
    if args.json:
        print_json(records)
    else:
        for record in records:
            _print(record)
    return OK if all(record["passed"] for record in records) else FAILED


def _gemms(index: KernelIndex, file: str, target: str | None) -> list[Instance]:
    if not index.targets:
        raise ArtifactError(
            f"{file} has no GPU kernels. Compile the model for a GPU too, such as "
            "--target cpu,sm_100a."
        )
    if target is not None and target not in index.targets:
        raise TargetError(
            f"{file} has no kernels for {target}; it has some for {', '.join(index.targets)}."
        )
    found = {
        instance.name: instance
        for name, instance in index.all_instances()
        if instance.role == "gemm" and target in (None, name)
    }
    return list(found.values())


def _recorded(instance: Instance, files: Any) -> dict[str, Any]:
    from fpcompiler.artifact import jsonfile

    name = instance.files.get("proof")
    if name is None:
        raise ArtifactError(f"{instance.name} came without a record; leave out --recorded.")
    record = jsonfile.parse(files[name], f"kernels/{name}", 64 << 20)
    if record.get("sha256") != instance.sha256:
        raise ArtifactError(f"kernels/{name} is the record of another library.")
    return record


def _proved(instance: Instance) -> dict[str, Any]:
    from fpcompiler.codegen.proof.stored import recorded_proof
    from fpcompiler.options import Options

    options = Options.from_env()
    with progress(f"compiling {instance.name}"):
        kernel = _kernel(instance)
    with progress(f"checking {instance.name}"):
        record = recorded_proof(kernel, options)
    same = kernel.metadata["sha256"] == instance.sha256
    return {**record, "of_the_file": same}


def _kernel(instance: Instance) -> BuiltKernel:
    from fpcompiler.codegen import cutlass
    from fpcompiler.codegen.build import KernelCache
    from fpcompiler.options import Options

    source = cutlass.emit(cutlass.parse_instance(dict(instance.problem)))
    return KernelCache.from_options(Options.from_env()).build(source)


def _print(record: dict[str, Any]) -> None:
    verdict = "passed" if record["passed"] else "FAILED"
    which = "" if record.get("of_the_file", True) else " (compiled again here: other bytes)"
    rows = [
        (
            check["level"], check["name"], check["outcome"], _controls(check["controls"]),
            "; ".join(check["findings"]) or check["detail"],
        )
        for check in record["checks"]
    ]  # fmt: skip
    print_table(f"{record['kernel']}: {verdict}{which}", _HEADERS, rows)


def _controls(controls: dict[str, bool]) -> str:
    return f"{sum(controls.values())} of {len(controls)} red" if controls else ""


COMMAND: Final = Command(
    "prove",
    "check the GPU kernels of an artifact without the GPU",
    _EXAMPLE,
    _add_arguments,
    _run,
)
