"""Checks of quantizers that hold on the CPU, where CUDA is emulated, and on a GPU alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode, encode, pack, quantize
from fpcompiler.numerics.hadamard import hadamard
from fpcompiler.runtime.cuda import Quantized, QuantizeLibrary, QuantizeProblem
from fpcompiler.runtime.cuda.quantize import arguments_of
from fpcompiler.runtime.cuda.stored import BF16, I8
from fpcompiler.runtime.fused import produce
from tests.codegen.cuda.problems import quotients, write_values
from tests.numerics.test_scaling import difficult, gaussian
from tests.runtime.test_native_producers import Case, case, magnitude

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
POISON = 0xAA
EPS = 1e-5
Beside = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NONE: Beside = (None, None, None, None)


def rows_of(problem: QuantizeProblem, m: int, k: int) -> Tensor:
    """Return difficult rows in the middle of a larger tensor: at odd addresses, but in order."""
    x = torch.zeros(m, k + 5)
    x[:, :k] = difficult(max(m, 24), k)[:m] if k >= 64 else gaussian(m, k)
    x = x.to(DTYPES[problem.input])
    return torch.where(x.isfinite(), x, 1)[:, :k]


def special_rows(problem: QuantizeProblem) -> Tensor:
    """Return every number of the format and every middle between two, and their neighbours."""
    spec = problem.operand.format
    numbers = torch.tensor(sorted({v for v in spec.values if abs(v) <= spec.max}))
    points = torch.cat([numbers, (numbers[1:].double() + numbers[:-1].double()).float() / 2])
    infinite = torch.tensor(torch.inf)
    near = [points, torch.nextafter(points, infinite), torch.nextafter(points, -infinite)]
    return torch.cat([*near, 1.1 * points, -points])


def halves() -> Tensor:
    """Return every finite bfloat16, as fp32."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    return values[values.isfinite()]


class Runner:
    """Runs kernels on one device.

    Args:
        device: ``cpu`` for emulated kernels.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def quantize(
        self,
        library: QuantizeLibrary,
        index: int,
        x: Tensor,
        beside: Beside = NONE,
        pitch: int | None = None,
        given: Tensor | None = None,
    ) -> Quantized:
        problem, k = library.problems[index], x.shape[-1]
        m = x.numel() // k
        out = Quantized.empty(problem, m, k, self.device, pitch)
        out.codes.fill_(POISON)
        out.outer_scale.view(torch.uint8).fill_(POISON)
        out.block_scale.view(torch.uint8).fill_(POISON)
        if given is not None:
            out.outer_scale.copy_(given.view(-1))
        x, moved = self._move(x, beside)
        if self.device == "cpu":
            library.launch(index, arguments_of(problem, x, out, moved, EPS), 0)
        else:
            library.quantize(index, x, out, beside=moved, eps=EPS)
        return Quantized(*(tensor.cpu() for tensor in out))

    def values(self, library: QuantizeLibrary, index: int, x: Tensor, beside: Beside) -> Tensor:
        """Return what is quantized."""
        problem, k = library.problems[index], x.shape[-1]
        out = Quantized.empty(problem, x.numel() // k, k, self.device)
        values = torch.empty(x.numel() // k, k, device=self.device)
        x, moved = self._move(x, beside)
        arguments = arguments_of(problem, x, out, moved, EPS)
        write_values(library, index, arguments, values.data_ptr(), 0)
        return values.cpu()

    def _move(self, x: Tensor, beside: Beside) -> tuple[Tensor, Beside]:
        if self.device == "cpu":
            return x, beside
        # A copy to another device would lie in memory without gaps.
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        weight, bias, scale, shift = (None if t is None else t.to(self.device) for t in beside)
        return moved.copy_(x), (weight, bias, scale, shift)


def swizzle(scales: Tensor) -> Tensor:
    """Return scales in atoms of 128 rows by 4 columns, as CUTLASS's documentation has them."""
    rows, columns = scales.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
    padded[:rows, :columns] = scales
    atoms = padded.view(len(padded) // 128, 4, 32, padded.shape[1] // 4, 4)
    return atoms.permute(0, 3, 2, 1, 4).reshape(-1)


def assert_is(found: Quantized, x: Tensor, problem: QuantizeProblem) -> None:
    """Check every byte that a kernel wrote against ``fpcompiler.numerics``."""
    operand, k = problem.operand, x.shape[-1]
    codes, scales = quantize(x.reshape(-1, k), operand)
    assert_codes(found, codes, problem, scales[-1] if operand.block else None)
    if operand.outer:
        assert torch.equal(found.outer_scale[: scales[0].numel()], scales[0].view(-1))
    if problem.stored == I8:
        assert_sums(found, codes, problem)
    if operand.block and problem.stored != BF16:
        expected = swizzle(scales[-1]) if problem.swizzled else scales[-1]
        assert torch.equal(found.block_scale, expected)
    assert int(found.status) == 0


def assert_codes(
    found: Quantized, codes: Tensor, problem: QuantizeProblem, block_scale: Tensor | None = None
) -> None:
    """Check what a kernel stored, and that there are zeros behind it.

    Args:
        found: What it wrote.
        codes: What numerics give.
        problem: What was computed.
        block_scale: The codes of the scales of blocks.
    """
    expected = stored(codes, problem, block_scale)
    size = expected.shape[-1]
    assert torch.equal(found.codes[:, :size], expected)
    assert not found.codes[:, size:].any(), "what is behind the codes must be zeros"


def stored(codes: Tensor, problem: QuantizeProblem, block_scale: Tensor | None) -> Tensor:
    """Return codes in the form of a problem, from their values in fp64: uint8 ``[M, bytes]``."""
    spec, block = problem.operand.format, problem.operand.block
    values = decode(codes, spec).double()
    if problem.stored == "f8E4M3FN":
        return encode(values.float(), FORMATS["f8E4M3FN"])
    if problem.stored == I8:
        return integers(codes, problem).to(torch.int8).view(torch.uint8)
    if problem.stored == BF16:
        if block and block_scale is not None:
            scale = decode(block_scale, FORMATS[block.format]).double()
            values *= scale.repeat_interleave(block.block, dim=-1)[:, : codes.shape[-1]]
        return values.to(torch.bfloat16).contiguous().view(torch.uint8)
    return pack(codes, problem.code_bits)


def integers(codes: Tensor, problem: QuantizeProblem) -> Tensor:
    """Return the values of codes as integers, times the least power of two, int64."""
    numbers = torch.tensor(problem.operand.format.values, dtype=torch.float64)
    units = next(2.0**s for s in range(64) if bool((numbers * 2.0**s % 1 == 0).all()))
    values = decode(codes, problem.operand.format).double() * units
    return values.to(torch.int64)


def assert_sums(found: Quantized, codes: Tensor, problem: QuantizeProblem) -> None:
    """Check the sums of integers, which stand behind the scales of rows."""
    sums = found.outer_scale[len(codes) :].view(torch.int32)
    assert torch.equal(sums.long(), integers(codes, problem).sum(-1))


def check_rows(run: Runner, library: QuantizeLibrary, index: int, m: int, k: int) -> None:
    problem = library.problems[index]
    x = rows_of(problem, m, k)
    given = None
    if problem.given:
        given = quantize(x, problem.operand)[1][0]
    pitch = problem.row_bytes(-(-k // 128) * 128) if m % 2 else None
    assert_is(run.quantize(library, index, x, pitch=pitch, given=given), x, problem)


def check_numbers(run: Runner, library: QuantizeLibrary, index: int) -> None:
    """Check all that a format can make of numbers, in a row without a scale."""
    problem = library.problems[index]
    x = torch.cat([special_rows(problem), halves()])[None]
    assert_is(run.quantize(library, index, x), x, problem)


def produced_case(problem: QuantizeProblem, rows: int, channels: int) -> Case:
    plain = case(problem.producer, rows, channels, torch.float32)
    x = plain.x.to(DTYPES[problem.input])
    beside = [
        None if value is None else value.to(DTYPES[type])
        for value, type in zip(plain[1:5], problem.beside, strict=True)
    ]
    return Case(x, *beside, problem.producer, EPS)


def check_produced(run: Runner, library: QuantizeLibrary, index: int, m: int, k: int) -> Tensor:
    """Check the values of a producer, and that they are quantized as if they had been stored."""
    problem = library.problems[index]
    given = produced_case(problem, m, k)
    beside = given[1:5]
    values = run.values(library, index, given.x, beside)
    expected = produce(*given)
    # As for the native library, which rounds in the same places.
    error = (values.double() - expected.double()).abs()
    dtype = DTYPES[problem.input]
    assert bool((error <= 6 * torch.finfo(dtype).eps * magnitude(given)).all())
    assert torch.equal(values, values.to(expected.dtype).float())
    assert_is(run.quantize(library, index, given.x, beside), values, problem)
    return values


def check_rotated(run: Runner, library: QuantizeLibrary, index: int, m: int, k: int) -> None:
    """Check transformed values against fp64, with the error of sums of that many terms."""
    problem = library.problems[index]
    block, dtype = problem.hadamard, DTYPES[problem.input]
    x, beside = gaussian(m, k).to(dtype), NONE
    before = x
    if problem.producer:
        given = produced_case(problem, m, k)
        x, beside = given.x, given[1:5]
        before = produce(*given)
    values = run.values(library, index, x, beside)
    expected = hadamard(before.double(), block)
    size = before.double().abs().view(m, -1, block).sum(-1, keepdim=True) / block**0.5
    # One rounding for each stage, one of the factor and one of the product with it; a producer has
    # errors of its own, of a last bit for each value.
    relative = (block.bit_length() + 1) * 2.0**-23 + (
        torch.finfo(dtype).eps if problem.producer else 0
    )
    bound = (relative * size).expand(-1, -1, block).reshape(m, k)
    error = (values.double() - expected).abs()
    assert bool((error <= bound + torch.finfo(dtype).eps * expected.abs()).all())
    assert torch.equal(values, values.to(dtype).float())
    assert_is(run.quantize(library, index, x, beside), values, problem)


def check_quotients(run: Runner, library: QuantizeLibrary) -> None:
    """Check quotients that are close to the middle between two codes, and others."""
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    totals = torch.rand(count, generator=generator) + 1
    # Significands of a few bits, and those just below 2, are where corrections could fail.
    totals[::4] = (totals[::4] * 64).round() / 64
    totals[1::4] = 2 - torch.arange(1, count // 4 + 1) % 32 * 2.0**-23
    totals *= torch.exp2(torch.randint(-70, 70, (count,), generator=generator))
    middles = torch.randint(-128, 128, (count, 8), generator=generator) / 16 * totals[:, None]
    nudged = middles * (1 + torch.randint(-3, 4, middles.shape, generator=generator) * 2.0**-23)
    x = torch.cat([nudged, torch.randn(count, 8, generator=generator) * totals[:, None]], dim=1)
    found = quotients(library, x.to(run.device), totals.to(run.device)).cpu()
    assert torch.equal(found.view(torch.int32), (x / totals[:, None]).view(torch.int32))


def check_activations(
    run: Runner, library: QuantizeLibrary, index: int, repeats: int, few: int
) -> None:
    """Check that many rows, whose activations are looked up, are quantized like a few of them."""
    problem, k = library.problems[index], 60
    assert DTYPES[problem.input] == torch.bfloat16
    # Numbers of one size share a row, so that none is too small for its scale.
    bits = torch.arange(0x7F80, dtype=torch.int32).repeat_interleave(2)
    bits = bits + torch.tensor([0, 0x8000]).repeat(len(bits) // 2)
    x = bits.to(torch.int16).view(torch.bfloat16).reshape(-1, k).repeat(repeats, 1)
    factors = gaussian(len(x), k).bfloat16() if problem.beside[2] else None
    whole = run.quantize(library, index, x, (None, None, factors, None))
    for part in (slice(begin, begin + few) for begin in range(0, len(x) // repeats, few)):
        own = None if factors is None else factors[part]
        found = run.quantize(library, index, x[part], (None, None, own, None))
        assert torch.equal(found.codes, whole.codes[part])
        scales = whole.outer_scale.view(torch.int32).view(-1, len(x))[:, part]
        assert torch.equal(found.outer_scale.view(torch.int32), scales.reshape(-1))


def check_status(run: Runner, library: QuantizeLibrary, index: int) -> None:
    problem = library.problems[index]
    for value in (torch.nan, torch.inf, -torch.inf):
        x = gaussian(5, 96).to(DTYPES[problem.input])
        x[3, 77] = value
        beside = produced_case(problem, 5, 96)[1:5] if problem.producer else NONE
        assert int(run.quantize(library, index, x, beside).status) == 1
