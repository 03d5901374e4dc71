"""The native attention against torch's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.native import library
from fpcompiler.runtime.program import attention as module
from fpcompiler.runtime.program.attention import NativeAttention

pytestmark = pytest.mark.skipif(library() is None, reason="needs the native library")

OPERATOR = torch.ops.aten.scaled_dot_product_attention.default


def refuse(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("torch ran")


NATIVE = NativeAttention(refuse)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    wide = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    return OPERATOR(q.double(), k.double(), v.double(), wide, **kwargs)


def tensors(seed: int, b: int, h: int, g: int, m: int, n: int, d: int, e: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = [(b, m, h, d), (b, n, g, d), (b, n, g, e)]
    return [torch.randn(shape, generator=source).transpose(1, 2) * 2 for shape in shapes]


def require_close(got: Tensor, wanted: Tensor, v: Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 4e-6 * v.abs().max()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1 << 16), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 16), st.integers(1, 70), st.integers(1, 80), st.integers(1, 80), st.booleans(),
)  # fmt: skip
def test_random_sizes(
    seed: int, b: int, g: int, r: int, m: int, n: int, d: int, e: int, causal: bool
) -> None:
    q, k, v = tensors(seed, b, g * r, g, m, n, d, e)
    kwargs = {"is_causal": causal, "enable_gqa": r > 1}
    got = NATIVE(q, k, v, None, 0.0, causal, enable_gqa=r > 1)
    require_close(got, exact(q, k, v, **kwargs), v)


@pytest.mark.parametrize("shape", [(2, 4, 3, 21), (1, 4, 3, 21), (2, 1, 1, 21), (3, 21)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_any_shape(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = tensors(0, 2, 4, 2, 3, 21, 16, 16)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = mask > 0 if kind == "bool" else torch.where(mask > 0.5, -torch.inf, mask)
    got = NATIVE(q, k, v, mask, 0.0, False, enable_gqa=True)
    require_close(got, exact(q, k, v, mask, enable_gqa=True), v)


def test_a_query_that_sees_nothing_gives_zeros_as_in_torch() -> None:
    q, k, v = tensors(0, 1, 2, 2, 3, 9, 16, 16)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    got = NATIVE(q, k, v, mask, 0.0, False)
    assert (got[:, :, 1] == 0).all()
    require_close(got, OPERATOR(q, k, v, mask), v)


def test_what_is_masked_is_not_read() -> None:
    q, k, v = tensors(0, 1, 2, 2, 1, 40, 16, 16)
    mask = (torch.arange(40) < 7)[None]
    wanted = NATIVE(q, k, v, mask, 0.0, False)
    k[:, :, 7:], v[:, :, 7:] = torch.nan, torch.nan
    assert torch.equal(NATIVE(q, k, v, mask, 0.0, False), wanted)


def test_nan_stays_nan() -> None:
    q, k, v = tensors(0, 1, 2, 2, 2, 9, 16, 16)
    q[0, 0, 1, 3] = torch.nan
    got = NATIVE(q, k, v, None, 0.0, False)
    assert got[0, 0, 1].isnan().all()
    assert got[0, 1].isfinite().all()


@pytest.mark.parametrize("instructions", range(5))
def test_every_instruction_set(instructions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library()
    assert native is not None
    if instructions > native.instructions:
        pytest.skip("the processor does not have it")
    own = type(native)(native.functions, instructions)
    monkeypatch.setattr(module, "library", lambda: own)
    for m, n, d in itertools.product((1, 5), (1, 15, 64, 300), (8, 24, 64, 100)):
        q, k, v = tensors(n, 1, 3, 1, m, n, d, d)
        require_close(NATIVE(q, k, v, enable_gqa=True), exact(q, k, v, enable_gqa=True), v)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.half(), k.half(), v.half()),
        lambda q, k, v: (q[0], k[0], v[0]),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (q, k, v, None, 0.5),
        lambda q, k, v: (q, k, v, torch.zeros(3, 9, dtype=torch.float64)),
    ],
)
def test_what_it_does_not_take_runs_in_torch(change: Any) -> None:
    called: list[Any] = []

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        called.append(args)
        return args[0]

    NativeAttention(reference)(*change(*tensors(0, 1, 2, 2, 3, 9, 16, 16)))
    assert called


def test_many_queries_run_in_torch() -> None:
    q, k, v = tensors(0, 1, 2, 2, 17, 17, 16, 16)
    assert torch.equal(NativeAttention(OPERATOR)(q, k, v), OPERATOR(q, k, v))
