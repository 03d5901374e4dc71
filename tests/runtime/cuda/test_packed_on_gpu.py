"""Kernels of packed weights on a Hopper GPU, from the operator of one layer to whole models.

``gpu_bundle.py`` builds the kernels and models elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.artifact import read
from fpcompiler.artifact.kernels import KernelIndex
from fpcompiler.errors import NumericsError
from fpcompiler.native import library
from fpcompiler.numerics import dequantize, pack, quantize, sqnr_db
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime import reference
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.kernels import CudaKernels, load_kernels
from fpcompiler.runtime.cuda.layers import CudaLinear
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.trust import Gatekeeper
from fpcompiler.scheme.presets import find_preset
from fpcompiler.tree import flatten
from tests.runtime.cuda.gpu_bundle import PACKED
from tests.runtime.cuda.test_on_gpu import CUDA, normal, poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]

ROWS = (1, 2, 8, 9, 16, 17, 31, 64, 77, 130, 300, 4096)
SHAPES = ((16, 128), (77, 200), (1000, 1000), (520, 16384), (4096, 4096))
MOST_PRODUCTS = 1 << 32
INTEGERS = ("i8", "i8-e2m1")


def operands(name: str) -> tuple[Operand, Operand | None]:
    preset = find_preset(PACKED[name])
    activation = None if preset.activation == "none" else Operand.parse(preset.activation)
    return Operand.parse(preset.weight), activation


def kernels_of(folder: Path, name: str) -> CudaKernels:
    gatekeeper = Gatekeeper(Options.from_env(), trust=True)
    found = load_kernels(read(folder / f"packed-{name}.fpc").kernels, CUDA, gatekeeper)
    assert found is not None
    return found


def linear_of(folder: Path, name: str, weight: Tensor, bias: Tensor | None) -> CudaLinear:
    kernels = kernels_of(folder, name)
    gemm = next(gemm for gemm in kernels.gemms.values() if gemm.activation == "none")
    operand, activation = operands(name)
    codes, scales = quantize(weight, operand)
    w = [pack(codes, 4), *scales]
    return CudaLinear(
        {"decode": gemm}, kernels.machine, w, bias, activation, operand, weight.shape[1],
        torch.bfloat16,
    )  # fmt: skip


def prepared(linear: CudaLinear, x: Tensor, activation: Operand | None):
    """Return the input for a layer, and its values in fp64."""
    if activation is None:
        half = x.bfloat16().to(CUDA)
        return linear.prepare_values(half), half.double()
    codes, scales = quantize(x, activation)
    values = dequantize(codes, scales, activation, torch.float64)
    return linear.prepare_codes([codes.to(CUDA), *(s.to(CUDA) for s in scales)]), values.to(CUDA)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_are_within_the_bound_of_fp64(
    folder: Path, shape: tuple[int, int], name: str
) -> None:
    n, k = shape
    operand, activation = operands(name)
    weight, bias = normal(n, k), normal(n, 1)[:, 0]
    linear = linear_of(folder, name, weight, bias)
    codes, scales = quantize(weight, operand)
    w = dequantize(codes, scales, operand, torch.float64).to(CUDA)
    mode = linear._decode.mode
    for m in ROWS:
        if m * n * k > MOST_PRODUCTS:
            continue
        with poisoned():
            x, values = prepared(linear, normal(m, k), activation)
            found = linear.multiply(x)
            again = linear.multiply(x)
        assert found.shape == (m, n)
        assert torch.equal(found, again)
        exact = values @ w.T + bias.to(CUDA).double()
        size = values.abs() @ w.abs().T + bias.to(CUDA).double().abs()
        # Sums of integers are exact; of FP8, chunks of 128 have 13 bits below their largest term.
        bits = {Mode.INTEGERS: 21, Mode.BF16: 16, Mode.E4M3: 11}[mode]
        bound = 2.0**-bits * size
        bound += torch.finfo(torch.bfloat16).eps / 2 * (exact.abs() + bound)
        error = (found.double() - exact).abs()
        worst = float((error / bound).max())
        assert worst <= 1, f"M={m}: {worst} of the bound"
        print(f"M={m} N={n} K={k} {name}: {float(error.norm() / exact.norm()):.2e} ({worst:.2f})")


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_is_added_to_rounded_results(
    folder: Path, shape: tuple[int, int], name: str
) -> None:
    """As by an operation of its own, bit for bit, by the kernels for few rows and for many."""
    n, k = shape
    _, activation = operands(name)
    linear = linear_of(folder, name, normal(n, k), normal(n, 1)[:, 0])
    for m in ROWS:
        if m * n * k > MOST_PRODUCTS:
            continue
        x, _ = prepared(linear, normal(m, k), activation)
        for residual in (normal(m, n).bfloat16().to(CUDA), normal(n, m).bfloat16().to(CUDA).T):
            with poisoned():
                found = linear.multiply(x, residual)
            assert torch.equal(found, linear.multiply(x) + residual), m


@pytest.mark.parametrize("name", INTEGERS)
def test_sums_of_integers_do_not_depend_on_the_batch(folder: Path, name: str) -> None:
    _, activation = operands(name)
    assert activation is not None
    for n, k in ((256, 4096), (1000, 1000)):
        linear = linear_of(folder, name, normal(n, k), normal(n, 1)[:, 0])
        codes, scales = quantize(normal(600, k), activation)
        x = [codes.to(CUDA), *(s.to(CUDA) for s in scales)]
        whole = linear.multiply(linear.prepare_codes(x))
        for rows in (slice(0, 1), slice(3, 20), slice(5, 13), slice(100, 400), slice(0, 17)):
            part = linear.multiply(linear.prepare_codes([piece[rows] for piece in x]))
            assert torch.equal(part, whole[rows]), (n, k, rows)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("biased", [False, True])
def test_layers_of_integers_are_the_bits_of_the_cpu(folder: Path, biased: bool, name: str) -> None:
    operand, activation = operands(name)
    for n, k in ((77, 200), (1000, 1000), (520, 16384), (4096, 4096)):
        weight, bias = normal(n, k), normal(n, 1)[:, 0] if biased else None
        linear = linear_of(folder, name, weight, bias)
        codes, scales = quantize(weight, operand)
        w = [pack(codes, 4), *scales]
        for m in (1, 8, 13, 17, 64, 300):
            codes, scales = quantize(normal(m, k), activation)
            expected = reference.linear(
                [codes, *scales], w, bias, activation, operand, k, torch.bfloat16
            )
            found = linear.multiply(linear.prepare_codes([x.to(CUDA) for x in (codes, *scales)]))
            assert torch.equal(found.cpu(), expected), (m, n, k)


@pytest.mark.parametrize("name", PACKED)
def test_quantizers_give_what_kernels_read(folder: Path, name: str) -> None:
    _, activation = operands(name)
    kernels = kernels_of(folder, name)
    linear = linear_of(folder, name, normal(64, 256), None)
    x = normal(33, 256).bfloat16()
    if activation is None:
        with pytest.raises(NumericsError, match="reads bfloat16"):
            linear.prepare_values(x.float().to(CUDA))
        return
    status = torch.zeros(1, dtype=torch.int32, device=CUDA)
    found = kernels.quantizers.quantize(linear.kind, x.to(CUDA), status)
    assert found is not None
    codes, scales = quantize(x, activation)
    expected = linear.prepare_codes([codes.to(CUDA), *(s.to(CUDA) for s in scales)])
    assert torch.equal(found.codes, expected.codes)
    if expected.token_scale is not None:
        assert torch.equal(
            found.token_scale.view(torch.int32), expected.token_scale.view(torch.int32)
        )


@pytest.mark.parametrize("name", PACKED)
def test_models_are_those_of_the_cpu(folder: Path, name: str) -> None:
    path = folder / f"packed-{name}.fpc"
    cpu, fast = load(path), load(path, device="cuda", trust=True, strict=True)
    index = KernelIndex.of(fast.artifact.kernels)
    assert all(row.kernels for row in index.targets["sm_90a"].layers.values())
    spec = cpu.artifact.plan.signature.outputs
    for rows in (1, 12, 60):
        ids = torch.randint(0, 90, (2, rows), generator=torch.Generator().manual_seed(rows))
        expected = flatten(spec, cpu(ids), "cpu")
        found = flatten(spec, fast(ids.to(CUDA)), "fast")
        for e, f in zip(expected, found, strict=True):
            assert sqnr_db(e, f.cpu()) > 20, sqnr_db(e, f.cpu())
    report = fast.verify()
    assert report.ok, report


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("name", INTEGERS)
def test_reproducible_models_are_the_bits_of_the_cpu(folder: Path, name: str) -> None:
    path = folder / f"packed-{name}.fpc"
    cpu = load(path, reproducible=True)
    gpu = load(path, device="cuda", trust=True, strict=True, reproducible=True)
    spec = cpu.artifact.plan.signature.outputs
    for rows in (1, 12, 60, 12, 12):  # the last ones are replayed
        ids = torch.randint(0, 90, (2, rows), generator=torch.Generator().manual_seed(rows))
        expected, found = flatten(spec, cpu(ids), "cpu"), flatten(spec, gpu(ids.to(CUDA)), "gpu")
        assert all(torch.equal(e, f.cpu()) for e, f in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", PACKED)
def test_a_captured_graph_replays_the_same(folder: Path, name: str) -> None:
    executor = load(folder / f"packed-{name}.fpc", device="cuda", trust=True)._ready()
    first = torch.randint(0, 90, (2, 12), device=CUDA)
    second = first.flip(-1).contiguous()
    leaf, own = first.clone(), executor.fresh()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        own.run_leaves([leaf])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = own.run_leaves([leaf])
    for x in (second, first, second):
        leaf.copy_(x)
        graph.replay()
        expected = executor.fresh().run_leaves([x])
        assert all(map(torch.equal, expected, outputs))
