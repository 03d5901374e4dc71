"""Level 0: CUTLASS, ml_dtypes and the table of formats agree on every code and rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from fpcompiler.codegen.proof import formats
from fpcompiler.codegen.proof.formats import prove_formats, values_to_round
from fpcompiler.codegen.proof.host_reference import TYPES, HostReference
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import pack

ML_DTYPES = {
    "f4E2M1FN": "float4_e2m1fn", "f6E2M3FN": "float6_e2m3fn", "f6E3M2FN": "float6_e3m2fn",
    "f8E4M3FN": "float8_e4m3fn", "f8E5M2": "float8_e5m2", "f8E8M0FNU": "float8_e8m0fnu",
}  # fmt: skip


def test_every_format_is_that_of_cutlass(reference: HostReference) -> None:
    proofs = prove_formats(reference)
    assert [proof.format for proof in proofs] == list(TYPES)
    for proof in proofs:
        assert proof.passed, proof
        assert proof.codes == FORMATS[proof.format].code_count
        assert proof.values > 30_000
        assert proof.to_json()["passed"] is True


@pytest.mark.parametrize("name", ML_DTYPES)
def test_cutlass_and_ml_dtypes_agree(reference: HostReference, name: str) -> None:
    spec, dtype = FORMATS[name], np.dtype(getattr(ml_dtypes, ML_DTYPES[name]))
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    theirs = reference.decode(pack(codes, spec.storage_bits), spec, len(codes)).numpy()
    np.testing.assert_array_equal(theirs, codes.numpy().view(dtype).astype(np.float32))
    if not spec.zero:
        return  # CUTLASS rounds scales up, ml_dtypes to nearest
    values = values_to_round(spec)
    values = values[values.abs() <= spec.max]
    expected = torch.from_numpy(values.numpy().astype(dtype).view(np.uint8))
    assert torch.equal(reference.encode(values, spec), expected)


def test_a_table_that_is_wrong_in_one_place_fails(reference, monkeypatch) -> None:
    right = formats.decode

    def wrong(codes, spec, *rest):
        values = right(codes, spec, *rest)
        values[3] *= 1.5
        return values

    monkeypatch.setattr(formats, "decode", wrong)
    for proof in prove_formats(reference):
        assert (proof.decoded_otherwise, proof.encoded_otherwise, proof.passed) == (1, 0, False)


def test_ties_the_other_way_fail(reference, monkeypatch) -> None:
    monkeypatch.setattr(
        formats, "encode", lambda x, spec: reference.encode(x * (1 + 2.0**-23), spec)
    )
    proofs = {proof.format: proof for proof in prove_formats(reference)}
    assert proofs["f4E2M1FN"].encoded_otherwise > 0
    assert not proofs["f4E2M1FN"].passed
