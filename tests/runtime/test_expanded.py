"""Layers whose weights are kept as bytes, against the definition, where there is no library."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fpcompiler
from fpcompiler.native import library
from fpcompiler.numerics import quantize, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import expanded, kernels, reference
from fpcompiler.runtime.expanded import ExpandedLayer, ExpandedLinear, fits
from fpcompiler.runtime.native_steps import NativeLayer
from fpcompiler.runtime.onednn import OneDnnLayer

WEIGHTS = (
    "e2m1@row:f32/block32:e8m0", "e2m1@tensor:f32/block16:e4m3", "e2m1@block128:f32", "e2m1",
    "e3m0@row:f32", "e2m3@block32:e8m0", "e1m6@tensor:f32",
)  # fmt: skip
INPUTS = ("", "e2m3@block32:e8m0", "e4m3@token:f32", "e2m1@tensor:f32/block16:e4m3")
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


def layer_of(
    w: Tensor, weight: Operand, inputs: Operand | None, bias: Tensor | None
) -> tuple[ExpandedLinear, list[Tensor]]:
    packed, scales = quantize_packed(w, weight)
    parts = [packed, *scales]
    return ExpandedLinear(parts, bias, inputs, weight, w.shape[1]), parts


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    m=st.integers(0, 20),
    weight=st.sampled_from(WEIGHTS),
    inputs=st.sampled_from(INPUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 1000, reference.CHUNK_VALUES]),
)
def test_the_bits_are_those_of_the_reference(
    n: int, k: int, m: int, weight: str, inputs: str, dtype: torch.dtype, bias: bool, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(1000 * n + k + m)
    w = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    x = torch.randn(2, m, k, generator=generator).to(dtype)
    b = torch.randn(n, generator=generator) if bias else None
    w_kind, x_kind = Operand.parse(weight), Operand.parse(inputs) if inputs else None
    parts = [x]
    if x_kind:
        codes, scales = quantize(x, x_kind)
        parts = [codes, *scales]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_VALUES", chunk)
        layer, stored = layer_of(w, w_kind, x_kind, b)
        found = layer(parts, dtype)
        expected = reference.linear(parts, stored, b, x_kind, w_kind, k, dtype)
    assert layer.is_exact()
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def test_what_fits() -> None:
    assert all(fits(Operand.parse(text)) for text in WEIGHTS)
    assert not fits(Operand.parse("e4m3@block32:e8m0"))
    assert not fits(Operand.parse("e3m2@row:f32"))  # 448 steps


def test_the_weights_take_a_byte_each() -> None:
    weight = Operand.parse("e2m1@row:f32/block32:e8m0")
    layer, _ = layer_of(torch.randn(64, 256), weight, None, None)
    assert layer.nbytes == 64 * 256 + 4 * (64 * 256 // 32) + 4 * 64


def test_scales_that_are_subnormal_numbers_are_left_to_the_reference() -> None:
    """A processor that flushes them would give zeros."""
    weight = Operand.parse("e2m1@block32:e8m0")
    packed, (scale,) = quantize_packed(torch.randn(4, 64), weight)
    for code, exact in ((1, False), (2, True)):  # 2**-126 and 2**-125, times 0.5
        parts = [packed, torch.full_like(scale, code)]
        assert ExpandedLinear(parts, None, None, weight, 64).is_exact() is exact


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FPC_NATIVE", "0")
    library.cache_clear()
    expanded.announce.cache_clear()
    yield
    monkeypatch.undo()
    library.cache_clear()
    expanded.announce.cache_clear()


@pytest.mark.parametrize("scheme", ["w4a6", "nvfp4", "w4a16", "w4a8-row", "fp4dit"])
def test_it_runs_layers_where_there_is_no_native_library(
    scheme: str, without_library, caplog: pytest.LogCaptureFixture
) -> None:
    model = fpcompiler.compile(Block().eval(), scheme, example_inputs=(X,))
    plain = fpcompiler.compile(Block().eval(), scheme, example_inputs=(X,), target="reference")
    code = [i for i in model._ready()._code if i.step.op == "fpc.linear"]
    assert all(isinstance(i.function, ExpandedLayer | OneDnnLayer) for i in code)
    assert [len(i.step.args) for i in code] == [8 if scheme != "w4a16" else 9, 10]
    names = {kernels.kernel_of(i.step, i.function, [], {}) for i in code}
    assert names <= {"fp32", "onednn"}
    assert torch.equal(model(X), plain(X))
    texts = [r.message for r in caplog.records if "No native library" in r.message]
    assert len(texts) == 1
    assert "one byte each" in texts[0]


def test_torch_compile_traces_the_reference(without_library) -> None:
    model = fpcompiler.compile(Block().eval(), "w4a6", example_inputs=(X,))
    function = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(function(X), model(X))


@pytest.mark.skipif(library() is None, reason="the native library was not built")
def test_an_artifact_runs_with_and_without_the_library(tmp_path, monkeypatch) -> None:
    model = fpcompiler.compile(Block().eval(), "w4a6", example_inputs=(X,))
    assert any(isinstance(i.function, NativeLayer) for i in model._ready()._code)
    model.save(tmp_path / "m.fpc")
    expected = model(X)
    monkeypatch.setenv("FPC_NATIVE", "0")
    library.cache_clear()
    try:
        other = fpcompiler.load(tmp_path / "m.fpc")
        assert any(isinstance(i.function, ExpandedLayer) for i in other._ready()._code)
        assert torch.allclose(other(X), expected, rtol=1e-4, atol=1e-4)
    finally:
        monkeypatch.undo()
        library.cache_clear()
