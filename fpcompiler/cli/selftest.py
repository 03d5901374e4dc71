"""``fpcompiler selftest``: run the kernels of an artifact on this GPU against what is on record."""

from __future__ import annotations

import argparse
from typing import Final

from fpcompiler.cli.command import FAILED, OK, Command
from fpcompiler.cli.output import print_json, print_rich, print_table, progress
from fpcompiler.errors import ArtifactError

__all__ = ["COMMAND"]

_HEADERS: Final = ("kernel", "problem", "outcome", "largest error, of the bound", "as modelled")
_TIMES: Final = ("kernel", "M x N x K", "microseconds", "TFLOP/s")
_EXAMPLE: Final = """\
  fpcompiler selftest model.fpc --trust

The model was compiled for this GPU too, such as with --target cpu,sm_100a. Its kernels multiply
operands whose results are known, then the recorded calls of the model are replayed. A number fails
if it is beyond the bound that holds for every order of additions; how many have the very bits of
our model of the tensor cores is told beside it. Please send us what it says: no
Blackwell GPU has run these kernels here."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an artifact with kernels for this GPU")
    parser.add_argument("--device", default="cuda", help="by default cuda")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load the kernels as they are; otherwise those not compiled here are compiled again",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler import artifact as artifacts
    from fpcompiler.codegen.proof.selftest import selftest, time_gemms
    from fpcompiler.options import Options
    from fpcompiler.runtime.cuda.kernels import load_kernels
    from fpcompiler.runtime.devices import parse_device
    from fpcompiler.runtime.loading import load
    from fpcompiler.runtime.trust import Gatekeeper

    device = parse_device(args.device)
    if device.type != "cuda":
        raise ArtifactError("selftest runs kernels of GPUs; give a CUDA device.")
    artifact = artifacts.read(args.file)
    with progress("loading kernels"):
        kernels = load_kernels(artifact.kernels, device, Gatekeeper(Options.from_env(), args.trust))
    if kernels is None:
        raise ArtifactError(
            f"{args.file} has no GPU kernels. Compile the model for this GPU too, such as "
            "--target cpu,sm_100a."
        )
    with progress("golden problems"):
        results = list(selftest(kernels))
    with progress("timing"):
        times = list(time_gemms(kernels))
    with progress("replaying the model"):
        report = load(args.file, device, trust=args.trust).verify()
    good = bool(results) and report.ok and all(result.verdict.passed for result in results)
    if args.json:
        print_json(
            {
                "ok": good,
                "problems": [{"kernel": r.kernel, **vars(r.verdict)} for r in results],
                "times": [
                    {"kernel": t.kernel, "size": t.size, "microseconds": t.microseconds}
                    for t in times
                ],
                "verify": report.to_json(),
            }
        )
        return OK if good else FAILED
    rows = [
        (
            r.kernel, r.verdict.problem, "passed" if r.verdict.passed else "FAILED",
            f"{r.verdict.error:.3f}", f"{r.verdict.equal} of {r.verdict.elements}",
        )
        for r in results
    ]  # fmt: skip
    print_table("golden problems", _HEADERS, rows)
    sizes = [(t.kernel, " x ".join(map(str, t.size)), t.microseconds, t.tflops) for t in times]
    print_table("times", _TIMES, [(k, s, f"{us:.1f}", f"{tf:.0f}") for k, s, us, tf in sizes])
    print_rich(report)
    return OK if good else FAILED


COMMAND: Final = Command(
    "selftest",
    "run the GPU kernels of an artifact on this GPU against what is on record",
    _EXAMPLE,
    _add_arguments,
    _run,
)
