"""The proof of whole kernels, one of each kind of target, which stay in the cache of kernels."""

import json
import shutil

import pytest

from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass import describe, emit
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.problem import Rows
from fpcompiler.codegen.proof.disassembly import find_disassembler
from fpcompiler.codegen.proof.launch import record_launch, why_no_recorder
from fpcompiler.codegen.proof.number_levels import check_golden
from fpcompiler.codegen.proof.prove import LEVELS, prove
from fpcompiler.codegen.proof.record import Check, Outcome, ProofRecord
from fpcompiler.errors import DependencyError, OptionError, TargetError
from fpcompiler.options import Options
from tests.codegen.problems import NVFP4, W4A6, W4A6_ROW, instance_of, problem
from tests.codegen.proof.samples import INSTANCE, SHAPE, launch

DATA_CENTRE = problem(W4A6, "sm_100a", Rows.DECODE)
RTX = problem(NVFP4, "sm_120a")
BOTH = pytest.mark.parametrize("layer", [DATA_CENTRE, RTX], ids=["sm_100a", "sm_120a"])


def built(layer) -> BuiltKernel:
    return KernelCache.from_options(Options.from_env()).build(emit(instance_of(layer)))


@pytest.fixture
def disassembler() -> None:
    try:
        find_disassembler(Options.from_env())
    except DependencyError as error:
        pytest.skip(str(error))


@pytest.mark.nvcc
@BOTH
def test_every_level_passes_and_every_control_is_noticed(layer) -> None:
    record = prove(built(layer))
    failed = [check for check in record.checks if check.outcome is Outcome.FAILED]
    assert not failed
    assert record.passed
    assert {check.level for check in record.checks} == set(LEVELS)
    without = {c.name for c in record.checks if c.outcome is not Outcome.SKIPPED and not c.controls}
    assert without == {"the library is this object"}
    assert json.loads(json.dumps(record.to_json()))["passed"] is True


@pytest.mark.nvcc
@pytest.mark.usefixtures("disassembler")
@BOTH
def test_machine_code_is_proved_where_there_is_a_disassembler(layer) -> None:
    record = prove(built(layer), ["L3"])
    names = {"instructions", "registers"} | ({"descriptor"} if layer is DATA_CENTRE else set())
    assert {check.name for check in record.checks} == names
    assert record.passed
    assert record.machine_code is not None
    assert record.machine_code.arch == layer.arch


@pytest.mark.nvcc
@BOTH
def test_the_launch_is_the_one_on_record(layer, golden) -> None:
    record = record_launch(built(layer), SHAPE)
    golden(f"{layer.arch}.json", json.dumps(record.to_json(), indent=1) + "\n")


@pytest.mark.nvcc
def test_the_sample_of_the_tests_is_what_is_recorded() -> None:
    assert record_launch(built(DATA_CENTRE), SHAPE) == launch()


@pytest.mark.nvcc
def test_the_object_of_another_kernel_is_noticed(tmp_path) -> None:
    folder = tmp_path / "kernel"
    shutil.copytree(built(DATA_CENTRE).folder, folder)
    shutil.copyfile(built(RTX).object, folder / "kernel.o")
    wrong = BuiltKernel(folder / "kernel.so", built(DATA_CENTRE).metadata, cached=True)
    record = prove(wrong, ["L2"])
    assert not record.passed
    names = {check.name for check in record.checks if check.outcome is Outcome.FAILED}
    assert {"launch 300x520x640", "the library is this object"} <= names


@pytest.mark.nvcc
@pytest.mark.usefixtures("disassembler")
def test_a_kernel_of_another_format_is_noticed() -> None:
    """The metadata claim E3M2 activations; the code multiplies E2M3."""
    found = built(DATA_CENTRE)
    claimed = {**found.metadata["description"], "a": "f6E3M2FN"}
    wrong = BuiltKernel(found.path, {**found.metadata, "description": claimed}, cached=True)
    record = prove(wrong, ["L2", "L3"])
    outcomes = {check.name: check.outcome for check in record.checks}
    assert outcomes["launch 300x520x640"] is Outcome.PASSED  # as wide, so that the maps are alike
    assert outcomes["descriptor"] is Outcome.FAILED


def fake(folder, layer=DATA_CENTRE) -> BuiltKernel:
    metadata = {"name": "gemm", "description": describe(instance_of(layer))}
    (folder / "kernel.so").write_bytes(b"no library")
    return BuiltKernel(folder / "kernel.so", metadata, cached=True)


def test_without_an_object_file_launches_are_not_recorded(tmp_path) -> None:
    kernel = fake(tmp_path)
    assert "object file is not beside it" in why_no_recorder(kernel)
    with pytest.raises(DependencyError, match="gemm cannot be recorded: its object file"):
        record_launch(kernel, SHAPE)


def test_another_level_is_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="there is no level L9; levels: L0, L1, L2, L3, L5, L6"):
        prove(fake(tmp_path), ["L2", "L9"])


def test_another_library_is_refused(tmp_path) -> None:
    with pytest.raises(TargetError, match="is no GEMM of fpcompiler"):
        prove(fake(tmp_path), ["L1"])


def test_expected_results_are_computed_again_and_a_wrong_number_is_noticed() -> None:
    (check,) = check_golden(INSTANCE)
    assert check.outcome is Outcome.PASSED
    assert len(check.controls) == 2
    (hopper,) = check_golden(instance_of(problem(W4A6_ROW, "sm_90a")))
    assert hopper.outcome is Outcome.SKIPPED


def record_of(*checks: Check) -> ProofRecord:
    return ProofRecord("gemm", "sm_100a", {}, "0", "nvcc", checks)


def test_a_record_passes_if_something_passed_and_nothing_failed() -> None:
    good = Check.of("L0", "codes", "all 16", controls={"swapped": True})
    bad = Check.of("L2", "launch", "5 maps", findings=("a: too wide",))
    skipped = Check.skipped("L3", "machine code", "there is no cuobjdump")
    assert record_of(good, skipped).passed
    assert not record_of(good, bad).passed
    assert not record_of(skipped).passed
    assert record_of(good, bad, skipped).rows() == [
        ("L0", "codes", "passed", "1 of 1 red", "all 16"),
        ("L2", "launch", "failed", "", "a: too wide"),
        ("L3", "machine code", "skipped", "", "there is no cuobjdump"),
    ]


def test_a_control_that_nobody_noticed_is_a_failure() -> None:
    check = Check.of("L1", "packing", "3 products", controls={"swapped": True, "padding": False})
    assert check.outcome is Outcome.FAILED
    assert record_of(check).rows()[0][3:] == ("1 of 2 red", "not noticed: padding")
