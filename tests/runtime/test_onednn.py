"""Layers on oneDNN's int8 product against the definition, and what happens without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fpcompiler
from fpcompiler.native import library
from fpcompiler.numerics import quantize, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import onednn, reference
from fpcompiler.runtime.expanded import announce
from fpcompiler.runtime.onednn import OneDnnLayer, OneDnnLinear, fits, product_problem

ROOT = Path(__file__).parents[2]
needs_product = pytest.mark.skipif(
    product_problem() is not None, reason=f"no int8 product of oneDNN: {product_problem()}"
)
WEIGHTS = ("e2m1@row:f32", "e1m2@tensor:f32", "e3m0@row:f32", "e2m1", "e2m3@row:f32")
INPUTS = ("e2m1@token:f32", "e2m3@token:f32", "e2m3@tensor:f32", "e2m1")


def both(
    n: int, k: int, m: int, weight: Operand, inputs: Operand, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor]:
    """Return what the layer gives, and what the reference gives."""
    generator = torch.Generator().manual_seed(1000 * n + k + m)
    w = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    x = torch.randn(m, k, generator=generator).to(dtype)
    packed, scales = quantize_packed(w, weight)
    codes, x_scales = quantize(x, inputs)
    b = torch.randn(n, generator=generator) if bias else None
    layer = OneDnnLinear([packed, *scales], b, inputs, weight, k)
    args = [codes, *x_scales], [packed, *scales], b, inputs, weight, k, dtype
    return layer(codes, *x_scales, dtype=dtype), reference.linear(*args)


@needs_product
@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    m=st.integers(0, 70),
    weight=st.sampled_from(WEIGHTS),
    inputs=st.sampled_from(INPUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
)
def test_the_bits_are_those_of_the_reference(
    n: int, k: int, m: int, weight: str, inputs: str, dtype: torch.dtype, bias: bool
) -> None:
    found, expected = both(n, k, m, Operand.parse(weight), Operand.parse(inputs), dtype, bias)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, expected)


@needs_product
@pytest.mark.parametrize(("k", "pieces"), [(11650, 1), (11651, 2), (16384, 2)])
def test_rows_that_are_too_long_for_exact_sums_are_cut(k: int, pieces: int) -> None:
    weight, inputs = Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32")
    # All codes are the largest, so that sums are as large as they can be.
    packed, scales = quantize_packed(torch.ones(3, k), weight)
    codes, x_scales = quantize(torch.ones(2, k), inputs)
    layer = OneDnnLinear([packed, *scales], None, inputs, weight, k)
    assert len(layer._products) == pieces
    args = [codes, *x_scales], [packed, *scales], None, inputs, weight, k, torch.float32
    assert torch.equal(layer(codes, *x_scales, dtype=torch.float32), reference.linear(*args))
    found, expected = both(3, k, 2, weight, inputs, torch.float32, True)
    assert torch.equal(found, expected)


def test_what_fits() -> None:
    row, token = Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32")
    assert fits(token, row)
    assert not fits(None, row)
    assert not fits(Operand.parse("e4m3@token:f32"), row)  # not an integer of eight bits
    assert not fits(Operand.parse("e2m3@block32:e8m0"), row)
    assert not fits(token, Operand.parse("e2m1@row:f32/block32:e8m0"))
    # 2 * 254 * 127 does not fit in 16 bits, which AVX2 adds two products in.
    assert not fits(Operand.parse("e1m6@token:f32"), Operand.parse("e1m6@row:f32"))
    assert fits(Operand.parse("e1m6@token:f32"), Operand.parse("e3m0@row:f32"))


@needs_product
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_other_processors_give_the_same_bits(instructions: str) -> None:
    """OneDNN reads once, when it starts, up to which instructions it may go."""
    names = "test_the_bits_are or test_rows_that_are"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch):
    def clear() -> None:
        for function in (library, onednn.usable, product_problem, announce):
            function.cache_clear()

    monkeypatch.setenv("FPC_NATIVE", "0")
    clear()
    yield
    monkeypatch.undo()
    clear()


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


def layers(model: fpcompiler.CompiledModel) -> list[object]:
    code = model._ready()._code
    return [i.function for i in code if i.step.op == "fpc.linear"]


@needs_product
def test_it_runs_layers_where_there_is_no_native_library(without_library, caplog) -> None:
    scheme = "w4a6-row; down: w=e2m1@row:f32/block32:e8m0,a=e2m3@block32:e8m0"
    model = fpcompiler.compile(Block().eval(), scheme, example_inputs=(X,))
    plain = fpcompiler.compile(Block().eval(), scheme, example_inputs=(X,), target="reference")
    up, down = layers(model)
    assert isinstance(up, OneDnnLayer)
    assert not isinstance(down, OneDnnLayer)
    assert torch.equal(model(X), plain(X))
    assert [r.message for r in caplog.records if "oneDNN" in r.message] == [
        "No native library: weights are expanded to one byte each. Layers of integer formats "
        "without scales of blocks run on oneDNN's int8 product, others on fp32 products, much "
        "slower."
    ]


@needs_product
def test_a_layer_computes_its_activation(without_library) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate = nn.Linear(64, 96)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(self.gate(x)) * 2

    for dtype in (torch.float32, torch.bfloat16):
        x, network = X.to(dtype), Gate().eval().to(dtype)
        model = fpcompiler.compile(network, "w4a6-row", example_inputs=(x,))
        plain = fpcompiler.compile(network, "w4a6-row", example_inputs=(x,), target="reference")
        (layer,) = layers(model)
        assert isinstance(layer, OneDnnLayer)
        assert "aten.silu.default" not in [step.op for step in model.artifact.plan.steps]
        assert torch.equal(model(x), plain(x))


class NoOperators:
    """A torch without the private operators."""


def wrong(x: Tensor, *args: object) -> Tensor:
    return torch.zeros(3, 70)


@pytest.mark.parametrize("fault", ["missing", "refuses", "inexact"])
def test_without_the_product_the_reference_runs(
    fault: str, without_library, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    if fault == "missing":
        monkeypatch.setattr(torch.ops, "onednn", NoOperators(), raising=False)
    elif fault == "refuses":
        monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda *args: 1 / torch.ones(()))
        monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", torch.ops.aten.mm)
    else:
        monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", wrong)
    model = fpcompiler.compile(Block().eval(), "w4a6-row", example_inputs=(X,))
    assert not any(isinstance(layer, OneDnnLayer) for layer in layers(model))
    plain = fpcompiler.compile(Block().eval(), "w4a6-row", example_inputs=(X,), target="reference")
    assert torch.equal(model(X), plain(X))
    text = {"missing": "has none", "refuses": "has none", "inexact": "it is not exact"}[fault]
    assert any(text in r.message and "fp32 products" in r.message for r in caplog.records)


def test_elsewhere_than_on_x86_it_is_not_used(without_library, monkeypatch) -> None:
    monkeypatch.setattr(onednn.platform, "machine", lambda: "aarch64")
    assert product_problem() == "it is fast on x86-64 only, and this is aarch64"
