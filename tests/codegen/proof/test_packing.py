"""Level 1: bytes for kernels mean to CUTLASS what the canonical layout means here."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fpcompiler.codegen.proof import matrix, packing
from fpcompiler.codegen.proof.host_reference import HostReference
from fpcompiler.codegen.proof.packing import (
    PAIRS,
    PROBLEMS,
    Mistake,
    PackingProblem,
    prove_packing,
)
from fpcompiler.errors import TargetError
from fpcompiler.numerics.kernel_layout import scale_bytes
from fpcompiler.operand import Operand

RAGGED = (77, 100, 200)


def problem(weight: str, activation: str, shape: tuple[int, int, int] = RAGGED) -> PackingProblem:
    return PackingProblem(Operand.parse(weight), Operand.parse(activation), *shape)


MX = problem("f4E3M0FN@row:f32/block32:f8E8M0FNU", "f6E2M3FN@block32:f8E8M0FNU")


def test_every_pair_of_operands(reference: HostReference) -> None:
    proof = prove_packing(reference)
    assert [case.problem for case in proof.cases] == list(PROBLEMS)
    assert {(c.problem.weight, c.problem.activation) for c in proof.cases} == set(PAIRS)
    assert proof.passed, [case for case in proof.cases if not case.passed]
    assert proof.cutlass == "4.2.0"
    for case in proof.cases:
        assert case.relative_error < 1e-6
        # A mistake is no matter of rounding.
        assert all(error > 100 for error in case.controls.values())
    seen = {mistake for case in proof.cases for mistake in case.controls}
    assert seen == set(Mistake)


def test_the_record_is_json(reference: HostReference) -> None:
    record = prove_packing(reference, [MX]).to_json()
    assert json.loads(json.dumps(dict(record))) == record
    assert record["cases"][0]["held"] == "f6E3M2FN"
    assert record["scale_layouts"] == [[32, 77, 200], [32, 100, 200]]
    assert record["passed"]


@pytest.mark.parametrize(("block", "rows", "k"), [(16, 300, 640), (32, 300, 640), (16, 129, 2048)])
def test_the_formula_of_the_scales_is_cutlass_s_layout(reference, block, rows, k) -> None:
    """The formula of cuBLAS's documentation, at every scale, against both operands' layouts."""
    row, block_of = torch.meshgrid(torch.arange(rows), torch.arange(k) // block, indexing="ij")
    tile = row // 128 * -(-k // (4 * block)) + block_of // 4
    expected = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block_of % 4
    for weights in (False, True):
        indices = reference.scale_indices(block, rows, k, weights=weights)
        assert torch.equal(indices, expected)
        assert int(indices.max()) < scale_bytes(rows, k // block)


def test_scales_in_another_order_are_noticed(reference, monkeypatch) -> None:
    right = packing.kernel_scales

    def wrong(*args):
        tiles = right(*args).clone()
        tiles[:2] = tiles[:2].flip(0)
        return tiles

    for module in (packing, matrix):
        monkeypatch.setattr(module, "kernel_scales", wrong)
    proof = prove_packing(reference, [MX])
    assert not proof.passed
    assert proof.scale_layouts == ()
    assert len(proof.scales_elsewhere) == 2
    assert not proof.cases[0].passed


def test_a_control_that_stays_green_fails_the_proof(reference, monkeypatch) -> None:
    monkeypatch.setattr(PackingProblem, "mistakes", lambda self: (Mistake.ROWS_NOT_PADDED,))
    whole = dataclasses.replace(MX, k=256)  # no padding there: the mistake changes nothing
    (case,) = prove_packing(reference, [whole]).cases
    assert case.error <= 1
    assert case.controls == {Mistake.ROWS_NOT_PADDED: case.error}
    assert not case.passed


@pytest.mark.parametrize(
    "shape", [(16, 576, 576), (3, 1, 128), (2, 1, 96), (1, 8, 160), (4, 24, 33), (1, 1, 1)]
)
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[-1]], ids=str)
def test_controls_are_only_those_that_can_show(reference, pair, shape) -> None:
    """K may end with a block, weights may be one row: no mistake is tried that changes nothing."""
    assert prove_packing(reference, [PackingProblem(*pair, *shape)]).cases[0].passed


def test_a_proof_of_nothing_fails(reference: HostReference) -> None:
    assert not prove_packing(reference, []).passed


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("f4E2M1FN@block16:f8E8M0FNU", "f4E2M1FN@block16:f8E8M0FNU"),
        ("f4E2M1FN@block32:f8E8M0FNU", "f6E2M3FN@token:f32"),
        ("f4E2M1FN@block32:f8E8M0FNU", "f4E2M1FN@block16:f8E4M3FN"),
    ],
)
def test_operands_that_blackwell_does_not_multiply(reference, weight, activation) -> None:
    with pytest.raises(TargetError, match="Blackwell multiplies operands of equal blocks, of 32"):
        prove_packing(reference, [problem(weight, activation)])
