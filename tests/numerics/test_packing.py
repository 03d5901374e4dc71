"""The layout of packed codes, from the formulas, and the fast way back to values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, decode_packed, pack, packed_bytes, unpack


def random_codes(*shape: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def layout(codes: list[int], bits: int) -> list[int]:
    """Return the bytes of a row, by the definition: code i stands at bit ``bits * i``."""
    number = sum(code << bits * i for i, code in enumerate(codes))
    return list(number.to_bytes(packed_bytes(len(codes), bits), "little"))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 6, 7, 8, 31, 64, 65])
def test_rows_follow_the_layout(bits: int, k: int) -> None:
    codes = random_codes(3, k, bits=bits)
    packed = pack(codes, bits)
    assert packed.tolist() == [layout(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, k), codes)


def test_every_pair_of_fp4_codes() -> None:
    first, second = torch.arange(256, dtype=torch.uint8) % 16, torch.arange(256) // 16
    codes = torch.stack([first, second.to(torch.uint8)], -1)
    assert pack(codes, 4).view(-1).tolist() == list(range(256))


def test_fp6_is_dense() -> None:
    assert pack(torch.tensor([1, 2, 3, 63], dtype=torch.uint8), 6).tolist() == [0x81, 0x30, 0xFC]
    assert packed_bytes(640, 6) == 480


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_any_shape_stride_and_offset(bits: int) -> None:
    codes = random_codes(6, 5, 17, bits=bits)
    for view in (codes, codes[:, :, 1:], codes.transpose(0, 2), codes[0, 0, 3:], codes[:0]):
        k = view.shape[-1]
        packed = pack(view, bits)
        assert packed.shape == (*view.shape[:-1], packed_bytes(k, bits))
        odd = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view_as(packed)
        assert torch.equal(unpack(packed, bits, k), view)
        assert torch.equal(unpack(odd, bits, k), view)


def test_codes_are_not_changed() -> None:
    for bits in (4, 6, 8):
        codes = random_codes(4, 8, bits=bits)
        before = codes.clone()
        packed = pack(codes, bits)
        packed.zero_()
        assert torch.equal(codes, before)


@pytest.mark.parametrize("spec", FORMATS.values(), ids=str)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 7, 12, 33])
def test_decode_packed_is_unpack_and_decode(spec: FloatSpec, k: int) -> None:
    codes = random_codes(2, 5, k, bits=min(spec.storage_bits, (spec.code_count - 1).bit_length()))
    packed = pack(codes, spec.storage_bits)
    expected = decode(codes, spec)
    bits = torch.int32
    assert torch.equal(decode_packed(packed, spec, k).view(bits), expected.view(bits))
    out = torch.full(expected.shape, 7.0)
    assert decode_packed(packed, spec, k, out=out) is out
    assert torch.equal(out.view(bits), expected.view(bits))


@pytest.mark.parametrize("name", ["f4E2M1FN", "f6E2M3FN", "f8E4M3FN"])
def test_decode_packed_of_every_code_and_of_slices(name: str) -> None:
    spec = FORMATS[name]
    codes = torch.arange(spec.code_count, dtype=torch.uint8).repeat(3)
    codes = codes.view(6, -1)
    packed = pack(codes, spec.storage_bits)
    expected = decode(codes, spec)
    k = codes.shape[-1]
    torch.testing.assert_close(
        decode_packed(packed, spec, k), expected, equal_nan=True, rtol=0, atol=0
    )
    shifted = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view_as(packed)
    for part in (packed[1:4], packed[::2], shifted):
        rows = decode_packed(part, spec, k)
        again = decode(unpack(part, spec.storage_bits, k), spec)
        torch.testing.assert_close(rows, again, equal_nan=True, rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    packed = torch.zeros(2, 3, dtype=torch.uint8)
    spec = FORMATS["f4E2M1FN"]
    with pytest.raises(NumericsError, match="5 bits cannot be packed"):
        pack(packed, 5)
    with pytest.raises(NumericsError, match=r"not torch\.float32 \[2, 3\]"):
        pack(packed.float(), 4)
    with pytest.raises(NumericsError, match=r"at least one axis, not torch\.uint8 \[\]"):
        pack(packed[0, 0], 4)
    with pytest.raises(NumericsError, match="7 codes of 4 bits take 4 bytes a row, not 3"):
        unpack(packed, 4, 7)
    with pytest.raises(NumericsError, match="9 codes of 4 bits take 5 bytes a row, not 3"):
        decode_packed(packed, spec, 9)
    with pytest.raises(NumericsError, match=r"contiguous fp32 of that shape, not torch\.float64"):
        decode_packed(packed, spec, 6, out=torch.empty(2, 6, dtype=torch.float64))
