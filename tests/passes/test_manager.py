"""The pass manager: verified, timed, observed; and the dumps that make every pass reproducible."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch_mlir import ir as mlir

from fpcompiler import ir, passes
from fpcompiler.cli.main import main
from fpcompiler.errors import IRError, PassError, TargetError
from fpcompiler.ir.types import TensorType
from fpcompiler.passes import Dumper, Pass, PassContext, Probe, parse_pipeline, run_pipeline
from tests.models import normal
from tests.passes.tiny import Attention, Mlp, tiny
from tests.programs import program_of, run_passes

DEFAULT = passes.pipeline_text(passes.default_pipeline("w4a6"))


@dataclass(frozen=True)
class Shrink(Pass):
    """A pass with a bug: it gives every linear layer a result with one column less."""

    name: ClassVar[str] = "shrink"

    def run(self, program: ir.Program, context: PassContext) -> None:
        """Break the program."""
        for op in program.operations("fpq.linear"):
            *sizes, last = TensorType((None, 64), "f32").shape
            wrong = TensorType((*sizes, last - 1), "f32").to_mlir()
            with mlir.InsertionPoint(op), op.location:
                mlir.Operation.create(
                    "fpq.linear", [wrong], list(op.operands), {"layer": op.attributes["layer"]}
                )


@dataclass(frozen=True)
class Crash(Pass):
    """A pass that raises an error that is not ours."""

    name: ClassVar[str] = "crash"

    def run(self, program: ir.Program, context: PassContext) -> None:
        """Raise."""
        {}["missing"]


def mlp() -> tuple[ir.Program, torch.Tensor]:
    return program_of(tiny(Mlp), normal(2, 32)), normal(2, 32)


def dumped(folder: Path, pipeline: str, kind=Mlp) -> ir.Program:
    x = normal(2, 32) if kind is Mlp else normal(1, 4, 32)
    program = program_of(tiny(kind), x)
    items = parse_pipeline(pipeline, {**passes.PASSES, "crash": Crash, "shrink": Shrink})
    observer = Dumper(folder, program, items, Probe(program, [x]))
    run_pipeline(program, items, observers=[observer])
    return program


def test_a_pass_that_leaves_an_invalid_program_is_caught_at_once(tmp_path: Path) -> None:
    with pytest.raises(IRError) as caught:
        dumped(tmp_path, "normalize,insert-quantize,shrink,cse")
    message = str(caught.value)
    assert "'fpq.linear' op result: shape [?, 63] is not [?, 64]" in message
    assert '"up"("tests/passes/tiny.py":19:0)' in message
    assert caught.value.__notes__[0] == "while running the pass shrink"
    assert (tmp_path / "03-shrink.failed.mlir").is_file()
    assert not list(tmp_path.glob("04-*"))


@pytest.mark.parametrize(
    ("pipeline", "error"),
    [
        ("normalize,crash", KeyError),
        ("normalize,insert-quantize,lower-gemm{target=sm_100a}", TargetError),
    ],
)
def test_the_input_of_a_failing_pass_is_kept_with_its_reproducer(
    tmp_path: Path, pipeline: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        dumped(tmp_path, pipeline)
    (failed,) = tmp_path.glob("*.failed.mlir")
    last = pipeline.split(",")[-1]
    assert caught.value.__notes__ == [
        f"while running the pass {last}",
        f"its input is kept; to run it again: fpcompiler opt {failed} -p {shlex.quote(last)}",
    ]
    number = failed.name[:2]
    (before,) = tmp_path.glob(f"0{int(number) - 1}-*.mlir")
    comment, text = failed.read_text().split("\n", 1)
    assert comment == f"// fpcompiler opt {before.name} -p {shlex.quote(last)}"
    assert text == re.sub(r"^//.*\n", "", before.read_text())


def test_opt_reproduces_a_failure_from_its_dump(tmp_path: Path, capsys) -> None:
    with pytest.raises(TargetError) as caught:
        dumped(tmp_path, "normalize,insert-quantize,lower-gemm{target=sm_100a}")
    command = caught.value.__notes__[1].partition("fpcompiler ")[2]
    assert main(shlex.split(command)) == 1
    # The dump has everything: layer, place and reason are the same.
    assert str(caught.value).splitlines()[0] in capsys.readouterr().err


def test_stages_are_checked_before_the_first_pass_runs() -> None:
    program, _ = mlp()
    text = ir.print_program(program)
    with pytest.raises(
        PassError, match=r"^quantize-weights needs a program at stage quantized, but"
    ):
        run_passes(program, "normalize,quantize-weights")
    assert ir.print_program(program) == text
    with pytest.raises(PassError, match=r"^normalize needs .* there it is at stage lowered"):
        run_passes(program, f"{DEFAULT},normalize")
    assert ir.print_program(program) == text


def test_passes_are_timed_and_counted() -> None:
    program, _ = mlp()
    results = run_passes(program, DEFAULT)
    assert ",".join(result.text for result in results) == DEFAULT
    assert all(result.seconds > 0 and result.verify_seconds > 0 for result in results)
    found = {result.text.split("{")[0]: result.statistics for result in results}
    assert found["insert-quantize"] == {"layers quantized": 2, "layers kept": 1}
    assert found["lower-gemm"] == {"layers lowered": 2}
    assert found["quantize-weights"]["weights quantized"] == 2
    assert 0 not in [n for result in results for n in result.statistics.values()]


def test_progress_wraps_the_long_loops() -> None:
    seen = []

    def progress(items, total, label):
        seen.append((label, total))
        return items

    program, _ = mlp()
    run_pipeline(program, parse_pipeline(DEFAULT), progress=progress)
    assert seen == [("quantizing weights", 2)]


@pytest.mark.parametrize("kind", [Mlp, Attention])
def test_golden_dumps(kind: type[torch.nn.Module], tmp_path: Path, golden) -> None:
    dumped(tmp_path, DEFAULT, kind)
    files = sorted(tmp_path.glob("*.mlir"))
    assert [file.stem for file in files][:1] == ["00-captured"]
    for file in files:
        golden(f"{kind.__name__.lower()}-{file.name}", file.read_text())


def test_only_passes_that_change_something_write_files(tmp_path: Path) -> None:
    dumped(tmp_path, f"symbol-dce,{DEFAULT}")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "00-captured.mlir",
        "03-normalize.diff",
        "03-normalize.mlir",
        "05-insert-quantize.diff",
        "05-insert-quantize.mlir",
        "07-quantize-weights.diff",
        "07-quantize-weights.mlir",
        "08-lower-gemm.diff",
        "08-lower-gemm.mlir",
        "09-canonicalize.diff",
        "09-canonicalize.mlir",
        "11-fuse-quantize.diff",
        "11-fuse-quantize.mlir",
        "13-fuse-residual.diff",
        "13-fuse-residual.mlir",
        "14-symbol-dce.diff",
        "14-symbol-dce.mlir",
        "numerics.json",
        "pipeline.txt",
        "timing.json",
    ]
    assert (tmp_path / "pipeline.txt").read_text() == f"symbol-dce,{DEFAULT}\n"


def test_numerics_say_what_each_pass_did_to_the_numbers(tmp_path: Path) -> None:
    dumped(tmp_path, DEFAULT)
    data = json.loads((tmp_path / "numerics.json").read_text())
    assert data["probe"] == [[2, 32]]
    rows = {row["after"].partition("-")[2]: row for row in data["passes"]}
    assert rows["normalize"]["outputs_sqnr_db"] == [None]
    assert rows["normalize"]["layers_sqnr_db"] == {"up": None, "down": None, "lm_head": None}
    quantized = rows["insert-quantize"]
    assert all(10 < db < 40 for db in quantized["layers_sqnr_db"].values())
    assert set(quantized["layers_sqnr_db"]) == {"up", "down", "lm_head"}
    assert 10 < quantized["outputs_sqnr_db"][0] < 40
    for name in ("quantize-weights", "lower-gemm", "canonicalize", "fuse-quantize", "symbol-dce"):
        assert rows[name]["outputs_sqnr_db"] == quantized["outputs_sqnr_db"]
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert [row["pass"] for row in timing] == [passes.pass_text(p) for p in parse_pipeline(DEFAULT)]


def test_a_new_compilation_replaces_the_dumps_of_the_old_one(tmp_path: Path) -> None:
    dumped(tmp_path, DEFAULT)
    dumped(tmp_path, "normalize")
    assert sorted(file.name for file in tmp_path.glob("*.mlir")) == [
        "00-captured.mlir", "01-normalize.mlir",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Mlp, Attention])
def test_opt_continues_a_pipeline_from_any_dump(
    kind: type[torch.nn.Module], tmp_path: Path
) -> None:
    program = dumped(tmp_path, DEFAULT, kind)
    final = ir.print_program(program)
    x = normal(2, 32) if kind is Mlp else normal(1, 4, 32)
    captured = program_of(tiny(kind), x)
    weights = ir.Weights({**captured.weights, **program.weights})
    items = DEFAULT.split(",")
    for file in sorted(tmp_path.glob("*.mlir")):
        done = int(file.name[:2])
        # Weights that were stored by then, or else the float ones.
        stored = weights if done >= items.index("quantize-weights") + 1 else captured.weights
        rest = ",".join(items[done:])
        copy = ir.Weights(dict(stored))
        assert passes.opt(file.read_text(), rest, copy) == final, file.name


def test_opt_says_which_weights_a_pass_needs(tmp_path: Path) -> None:
    dumped(tmp_path, "normalize,insert-quantize")
    text = (tmp_path / "02-insert-quantize.mlir").read_text()
    with pytest.raises(IRError, match=r"The value of @up.weight is not loaded\. .*--weights FILE"):
        passes.opt(text, "quantize-weights")


def test_the_probe_does_not_change_the_state(captured) -> None:
    from tests.models import cases
    from tests.programs import import_named, leaves_of

    program = import_named(captured("cached"))
    program.weights["k_cache"] = torch.zeros_like(program.weights["k_cache"])
    _, args, kwargs = cases()["cached"].make()
    Probe(program, leaves_of(captured("cached"), (args, kwargs)))
    assert not program.weights["k_cache"].any()
