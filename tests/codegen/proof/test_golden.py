"""Level 5: golden problems are the same everywhere, and a wrong result does not pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fpcompiler.codegen.proof import golden
from fpcompiler.codegen.proof.golden import GOLDEN, GoldenProblem
from fpcompiler.codegen.proof.host_reference import HostReference
from fpcompiler.errors import NumericsError, TargetError
from fpcompiler.numerics import decode
from fpcompiler.operand import Operand
from fpcompiler.target import lookup
from tests.numerics import exact_tensor_core as exact

RAGGED = [problem for problem in GOLDEN if problem.m == 5]


def test_the_hashes_are_those_on_record(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        golden._FILE.write_text(golden.to_json(), encoding="utf-8")
    assert {p.name: dict(golden.fingerprint(p)) for p in GOLDEN} == golden.recorded()
    assert golden._FILE.stat().st_size < 200_000


def test_every_kind_is_there_once_for_each_shape() -> None:
    kinds = {kind.name for kind in lookup("sm_100a").kinds}
    assert {problem.kind for problem in GOLDEN} == kinds - {"bf16"}
    assert len({problem.name for problem in GOLDEN}) == len(GOLDEN)
    hashes = [tuple(entry.values()) for entry in golden.recorded().values()]
    assert len(set(hashes)) == len(GOLDEN)


@pytest.mark.parametrize("problem", RAGGED, ids=lambda p: p.name)
def test_what_is_expected_is_within_the_bound(problem: GoldenProblem) -> None:
    expected = problem.expected()
    verdict = problem.judge(expected)
    assert verdict.passed
    assert verdict.as_modelled
    assert verdict.elements == 200
    rounded = problem.judge(expected.bfloat16())
    assert rounded.passed
    assert rounded.as_modelled


def changed(result: Tensor, value: float) -> Tensor:
    result = result.clone()
    result[3, 7] = value
    return result


@pytest.mark.parametrize("problem", RAGGED, ids=lambda p: p.name)
def test_wrong_results_do_not_pass(problem: GoldenProblem) -> None:
    right = problem.expected()
    for value in (torch.nan, torch.inf, float(right[3, 7]) + float(right.abs().max())):
        verdict = problem.judge(changed(right, value))
        assert (verdict.beyond, verdict.equal, verdict.passed) == (1, 199, False)
    assert not problem.judge(torch.zeros_like(right)).passed
    assert not problem.judge(right.flip(0)).passed
    assert not problem.judge((right * 1.05).bfloat16()).passed


def test_one_bit_is_no_error_but_is_told() -> None:
    problem = GOLDEN[0]
    right = problem.expected()
    right.view(torch.int32)[0, 0] += 1
    verdict = problem.judge(right)
    assert verdict.passed
    assert not verdict.as_modelled
    assert verdict.equal == verdict.elements - 1


@pytest.mark.parametrize("problem", GOLDEN, ids=lambda p: p.name)
def test_cutlass_computes_the_same_from_the_stored_bytes(
    reference: HostReference, problem: GoldenProblem
) -> None:
    a, b = problem.operands()
    verdict = problem.judge(reference.gemm(a.stored(), b.stored()))
    assert verdict.passed
    assert verdict.error < 0.5


def test_a_container_is_aligned_as_what_it_is() -> None:
    """E3M0 is multiplied as E3M2; the exponents of a code are those of the format that is read."""
    problem = next(p for p in RAGGED if p.weight.format.name == "f4E3M0FN" and p.kind == "f8f6f4")
    _, b = problem.operands()
    assert b.held.format.name == "f6E3M2FN"
    factor = b.factor()
    assert torch.equal(factor.values[:, :328], decode(b.codes, b.operand.format).double())
    value, exponent = factor.values[0, 0].item(), factor.exponents[0, 0].item()
    own = exact.of_float(value).exponent
    assert exponent == (None if own is None else max(own, -2))


def test_what_it_refuses() -> None:
    problem = GOLDEN[0]
    with pytest.raises(NumericsError, match=r"a result is 5 x 40 of fp32 or bf16, not .*\[40, 5\]"):
        problem.judge(problem.expected().T)
    with pytest.raises(NumericsError, match=r"not torch.float64 \[5, 40\]"):
        problem.judge(problem.expected().double())
    other = dataclasses.replace(problem, weight=Operand.parse("f4E2M1FN@block64:f8E8M0FNU"))
    with pytest.raises(TargetError, match="equal blocks"):
        other.expected()
