"""What kernels read, against the published formula; CUTLASS's word is in tests/codegen/proof."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, pack, packed_bytes, unpack
from fpcompiler.numerics.kernel_layout import (
    canonical_codes,
    kernel_codes,
    kernel_scales,
    scale_bytes,
    swizzle_scales,
    unswizzle_scales,
)
from fpcompiler.numerics.shift_lowering import Container, container

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E2M1, E2M3, E3M2 = FORMATS["f4E2M1FN"], FORMATS["f6E2M3FN"], FORMATS["f6E3M2FN"]
E4M3, E1M2, E3M0 = FORMATS["f8E4M3FN"], FORMATS["f4E1M2FN"], FORMATS["f4E3M0FN"]


def random_bytes(rows: int, columns: int, count: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (rows, columns), dtype=torch.uint8, generator=generator)


def scale_index(row: int, block: int, blocks: int) -> int:
    """The formula of the documentation, one scale at a time."""
    tiles = -(-blocks // 4)
    tile = row // 128 * tiles + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (32, 4), (100, 7), (128, 4), (300, 20)])
def test_every_scale_is_where_the_formula_puts_it(rows: int, blocks: int) -> None:
    scales = random_bytes(rows, blocks)
    swizzled = swizzle_scales(scales)
    expected = [0] * scale_bytes(rows, blocks)
    for row in range(rows):
        for block in range(blocks):
            expected[scale_index(row, block, blocks)] = int(scales[row, block])
    assert swizzled.tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=50)
@given(rows=st.integers(0, 300), blocks=st.integers(0, 40), seed=st.integers(0, 99))
def test_scales_come_back(device: str, rows: int, blocks: int, seed: int) -> None:
    scales = random_bytes(rows, blocks, seed=seed).to(device)
    swizzled = swizzle_scales(scales)
    assert swizzled.device == scales.device
    assert swizzled.shape == (scale_bytes(rows, blocks),)
    assert torch.equal(unswizzle_scales(swizzled, rows, blocks), scales)


@pytest.mark.parametrize(("block", "k", "columns"), [(32, 33, 4), (32, 640, 20), (16, 16, 8)])
def test_scales_cover_the_padding_of_k(block: int, k: int, columns: int) -> None:
    scales = random_bytes(3, -(-k // block))
    padded = unswizzle_scales(kernel_scales(scales, block, k), 3, columns)
    assert torch.equal(padded[:, : scales.shape[1]], scales)
    assert not padded[:, scales.shape[1] :].any()


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from(["f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN"]),
    rows=st.integers(1, 20),
    k=st.integers(1, 300),
    rows_to=st.sampled_from([1, 8]),
    k_to=st.sampled_from([32, 128]),
)
def test_codes_are_padded_with_zeros_and_come_back(
    device: str, name: str, rows: int, k: int, rows_to: int, k_to: int
) -> None:
    spec = FORMATS[name]
    codes = random_bytes(rows, k, spec.code_count).to(device)
    packed = pack(codes, spec.storage_bits)
    stored = kernel_codes(packed, spec, k, row_alignment=rows_to, k_alignment=k_to)
    wide = -(-k // k_to) * k_to
    assert stored.shape == (-(-rows // rows_to) * rows_to, wide * spec.storage_bits // 8)
    assert stored.is_contiguous()
    assert stored.device == packed.device
    everything = unpack(stored, spec.storage_bits, wide)
    assert torch.equal(everything[:rows, :k], codes)
    assert int(everything.count_nonzero()) == int(codes.count_nonzero())
    assert torch.equal(canonical_codes(stored, spec, rows, k), packed)


@pytest.mark.parametrize("source", [E1M2, E3M0, E2M1], ids=str)
@pytest.mark.parametrize("target", [E2M3, E3M2, E4M3], ids=str)
def test_containers_keep_every_value(source: FloatSpec, target: FloatSpec) -> None:
    if source is E3M0 and target is E2M3:
        pytest.skip("E2M3 has six powers of two, E3M0 seven: test_shift_lowering")
    held = container(source, 0, [target])
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 3)
    packed = pack(codes, 4)
    stored = kernel_codes(packed, source, 48, held=held)
    values = decode(unpack(stored, target.storage_bits, 128), target)[:, :48]
    expected = decode(codes, source) / held.factor
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(canonical_codes(stored, source, 2, 48, held=held), packed)


def test_a_code_that_no_narrow_value_has_is_refused() -> None:
    held = container(E2M1, 0, [E2M3])
    stored = pack(torch.ones(1, 128, dtype=torch.uint8), 6)
    with pytest.raises(NumericsError, match="some codes of f6E2M3FN stand for no value of f4E2M1"):
        canonical_codes(stored, E2M1, 1, 1, held=held)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = pack(random_bytes(2, 8, 16), 4)
    with pytest.raises(NumericsError, match=r"packed codes are uint8 \[rows, bytes\], not"):
        kernel_codes(packed[0], E2M1, 8)
    with pytest.raises(NumericsError, match="9 codes of 4 bits take 5 bytes a row, not 4"):
        kernel_codes(packed, E2M1, 9)
    with pytest.raises(NumericsError, match="cannot be held as if they were of f4E1M2FN"):
        kernel_codes(packed, E2M1, 8, held=container(E1M2, 0, [E2M3]))
    with pytest.raises(NumericsError, match="exponents up to 2 holds folded codes"):
        kernel_codes(packed, E2M1, 8, held=Container(E2M1, E4M3, 0, 2))
    with pytest.raises(NumericsError, match="hold 2 rows of 8 codes, not 3 of 8"):
        canonical_codes(packed, E2M1, 3, 8)
    with pytest.raises(NumericsError, match="64 values in blocks of 32 have 2 scales a row, not 3"):
        kernel_scales(random_bytes(4, 3), 32, 64)
    with pytest.raises(NumericsError, match=r"scales are uint8 \[rows, bytes\], not torch.float32"):
        swizzle_scales(torch.ones(2, 2))
    with pytest.raises(NumericsError, match="3 rows of 5 scales take 1024 bytes in tiles, not"):
        unswizzle_scales(torch.zeros(512, dtype=torch.uint8), 3, 5)


def test_fp6_rows_stay_dense() -> None:
    packed = pack(random_bytes(4, 640, 64), 6)
    assert kernel_codes(packed, E2M3, 640).shape == (4, packed_bytes(640, 6)) == (4, 480)
