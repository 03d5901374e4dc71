"""Attention, compiled for the CPU and run there, against fp64."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fpcompiler.runtime.cuda.attention import WIDTHS, AttendProblem, CachedRows, Call, Rows
from tests.codegen.attention.emulated import Library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
PROBLEMS = [AttendProblem(name, width) for name in DTYPES for width in WIDTHS]
CACHED = [AttendProblem("bf16", width, "f8E4M3FN") for width in WIDTHS]
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library([*PROBLEMS, *CACHED], tmp_path_factory.mktemp("attend"))


def tensors(
    problem: AttendProblem, batch: int, heads: int, groups: int, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(keys)
    sizes = (batch, heads, queries), (batch, groups, keys), (batch, groups, keys)
    dtype = DTYPES[problem.type]
    q, k, v = (torch.randn(*s, problem.width, generator=generator).to(dtype) for s in sizes)
    return 2 * q, k, v


def exact(call: Call) -> tuple[Tensor, Tensor]:
    """Return the result in fp64, and the sum of the magnitudes it is made of."""
    repeat = call.q.shape[1] // call.k.shape[1]
    rows = (_numbers(x).repeat_interleave(repeat, 1) for x in (call.k, call.v))
    q, k, v = call.q.double(), *rows
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, -math.inf)
    if call.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return weights @ v, weights @ v.abs()


def _numbers(rows: Rows) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.double()
    return rows.codes.view(torch.float8_e4m3fn).double() * rows.scale.double()


def check(library: Library, call: Call, sms: int = 132) -> Tensor:
    found = library.attend(call, sms)
    expected, magnitude = exact(call)
    # Weights are rounded once, and so is the result; sums and exponentials are of fp32.
    bound = 2.5 * EPSILON[call.q.dtype] * magnitude + 1e-6
    assert ((found.double() - expected).abs() <= bound).all()
    return found


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "queries", "keys"),
    [
        (1, 1, 1, 1, 1), (2, 4, 1, 1, 17), (1, 8, 2, 4, 64), (1, 3, 3, 1, 129),
        (1, 9, 3, 5, 77), (1, 16, 1, 1, 333),
    ],
)  # fmt: skip
def test_every_size(
    library: Library, problem: AttendProblem, batch: int, heads: int, groups: int, queries: int,
    keys: int,
) -> None:  # fmt: skip
    q, k, v = tensors(problem, batch, heads, groups, queries, keys)
    check(library, Call(q, k, v, grouped=True))


@pytest.mark.parametrize("sms", [1, 2, 4, 8, 132])
@pytest.mark.parametrize("queries", [2, 3])
def test_blocks_that_share_the_keys(library: Library, sms: int, queries: int) -> None:
    """One, two, four, eight and sixteen of them, with one and two instructions for the queries."""
    q, k, v = tensors(PROBLEMS[1], 1, 4, 1, queries, 1100)
    mask = torch.rand(queries, 1100, generator=torch.Generator().manual_seed(sms)) < 0.7
    check(library, Call(q, k, v, mask, grouped=True), sms)


@pytest.mark.parametrize("shape", [(50,), (3, 50), (1, 1, 3, 50), (2, 1, 1, 50), (2, 6, 3, 50)])
def test_masks(library: Library, shape: tuple[int, ...]) -> None:
    q, k, v = tensors(PROBLEMS[0], 2, 6, 2, 3, 50)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    check(library, Call(q, k, v, mask, grouped=True))


def test_keys_that_nobody_sees_are_not_read(library: Library) -> None:
    """What lies behind the newest token of a cache may be anything."""
    q, k, v = tensors(PROBLEMS[1], 1, 4, 2, 1, 256)
    mask = (torch.arange(256) <= 95).expand(1, 1, 1, 256)
    before = check(library, Call(q, k, v, mask, grouped=True))
    k[:, :, 96:], v[:, :, 96:] = torch.nan, torch.inf
    assert torch.equal(before, library.attend(Call(q, k, v, mask, grouped=True)))


def test_a_query_that_sees_nothing_gives_zeros(library: Library) -> None:
    q, k, v = tensors(PROBLEMS[0], 1, 2, 2, 2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    found = check(library, Call(q, k, v, mask))
    assert (found[:, :, 1] == 0).all()


def test_nan_stays(library: Library) -> None:
    q, k, v = tensors(PROBLEMS[0], 1, 2, 2, 2, 40)
    q[0, 1, 0, 5] = torch.nan
    found = library.attend(Call(q, k, v))
    assert found[0, 1, 0].isnan().all()
    assert found[0, 1, 1].isfinite().all()
    assert found[0, 0].isfinite().all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_scales(library: Library, scale: float) -> None:
    """With the largest one a single weight is 1, and others vanish."""
    q, k, v = tensors(PROBLEMS[2], 1, 4, 4, 3, 90)
    check(library, Call(q, k, v, scale=scale))


@pytest.mark.parametrize("queries", [1, 5, 16])
def test_causal(library: Library, queries: int) -> None:
    q, k, v = tensors(PROBLEMS[3], 1, 1, 1, queries, 40)
    check(library, Call(q, k, v, causal=True))


def test_tensors_with_gaps(library: Library) -> None:
    """As a cache and the columns of one product lie in memory."""
    q, k, v = tensors(PROBLEMS[1], 2, 4, 2, 3, 33)
    gaps = [x.new_zeros(2, x.shape[2], x.shape[1] + 2, 136).fill_(torch.nan) for x in (q, k, v)]
    views = [gap[:, :, 1:-1, :128].transpose(1, 2) for gap in gaps]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    assert torch.equal(
        check(library, Call(q, k, v, grouped=True)), library.attend(Call(*views, grouped=True))
    )


def test_results_are_the_same_each_time_and_in_each_batch(library: Library) -> None:
    q, k, v = tensors(PROBLEMS[0], 3, 4, 2, 1, 100)
    whole = library.attend(Call(q, k, v, grouped=True))
    for i in range(3):
        one = (x[i : i + 1] for x in (q, k, v))
        assert torch.equal(whole[i : i + 1], library.attend(Call(*one, grouped=True)))


def cached(problem: AttendProblem, *sizes: int) -> Call:
    """Return a call whose keys and values are all codes of E4M3, with scales of many sizes."""
    q, k, v = tensors(problem, *sizes)
    generator = torch.Generator().manual_seed(7)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    rows = []
    for x in (k, v):
        index = torch.randint(0, len(codes), x.shape, generator=generator)
        scale = torch.exp2(torch.randint(-12, -5, (*x.shape[:3], 1), generator=generator)) * 1.3
        rows.append(CachedRows(codes[index], scale, "f8E4M3FN", q.dtype))
    return Call(q, *rows, grouped=True)


@pytest.mark.parametrize("problem", CACHED, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 4, 2, 1, 50), (1, 9, 3, 5, 77)])
def test_keys_and_values_of_eight_bits(
    library: Library, problem: AttendProblem, sizes: tuple[int, ...]
) -> None:
    check(library, cached(problem, *sizes))


def test_scales_of_a_cache_with_gaps(library: Library) -> None:
    call = cached(CACHED[0], 2, 4, 2, 1, 40)
    mask = torch.arange(40) <= 17
    expected = library.attend(replace(call, mask=mask))
    rows = []
    for x in (call.k, call.v):
        assert isinstance(x, CachedRows)
        codes = torch.zeros(2, 48, 2, 72, dtype=torch.uint8)[:, :40, :, :64].transpose(1, 2)
        scale = torch.full((2, 48, 2, 2), torch.nan)[:, :40, :, :1].transpose(1, 2)
        rows.append(x._replace(codes=codes.copy_(x.codes), scale=scale.copy_(x.scale)))
    assert torch.equal(expected, library.attend(replace(call, k=rows[0], v=rows[1], mask=mask)))
