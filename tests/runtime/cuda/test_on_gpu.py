"""Compiled kernels on a Hopper GPU, from the operator of one layer to whole models.

``python -m tests.runtime.cuda.gpu_bundle FOLDER`` builds the kernels and models elsewhere;
``pytest tests/runtime/cuda/test_on_gpu.py --gpu-bundle FOLDER`` runs this. No compiler is needed
here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.artifact import read
from fpcompiler.artifact.kernels import DECODE_ROWS
from fpcompiler.errors import ArtifactError, NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode, dequantize, encode, pack, quantize, sqnr_db
from fpcompiler.numerics.tensor_core import HOPPER_FP8, Factor, error_bound, tensor_core_gemm
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.kernels import CudaKernels, load_kernels
from fpcompiler.runtime.cuda.layers import CudaLinear
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.trust import Gatekeeper
from fpcompiler.tree import flatten
from tests.runtime.cuda.gpu_bundle import ADDS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]

CUDA = torch.device("cuda")
WEIGHT = Operand.parse("f4E2M1FN@row:f32")
ACTIVATIONS = {
    "a4": Operand.parse("f4E2M1FN@token:f32"),
    "a6": Operand.parse("f6E2M3FN@token:f32"),
    "a8": Operand.parse("f8E4M3FN@token:f32"),
}
ROWS = (1, 16, 77, DECODE_ROWS, DECODE_ROWS + 1, 4096)
SHAPES = ((64, 128), (77, 200), (1000, 1000), (520, 16384))
MODELS = ("mlp-a4", "mlp-a6", "mlp-a8", "llama")
_CHUNK = 128
"""Sums of so many products are added in fp32, unless fast sums are asked of CUTLASS."""


def kernels_of(folder: Path, output: torch.dtype) -> CudaKernels:
    name = "llama" if output == torch.bfloat16 else "mlp-a6"
    gatekeeper = Gatekeeper(Options.from_env(), trust=True)
    found = load_kernels(read(folder / f"{name}.fpc").kernels, CUDA, gatekeeper)
    assert found is not None
    return found


def linear_of(
    folder: Path,
    weight: Tensor,
    bias: Tensor | None,
    activation: Operand,
    output: torch.dtype,
    kind: str = "",
) -> CudaLinear:
    kernels = kernels_of(folder, output)
    suffix = ("bf16" if output == torch.bfloat16 else "f32") + kind
    gemms = {use: kernels.gemms[f"{use}-{suffix}"] for use in ("decode", "prefill")}
    codes, scales = quantize(weight, WEIGHT)
    w = [pack(codes, 4), *scales]
    return CudaLinear(gemms, kernels.machine, w, bias, activation, WEIGHT, weight.shape[1], output)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill all memory that torch gives out with NaN, and bytes with 255."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=CUDA).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def bound_of(x: Tensor, w: Tensor) -> Tensor:
    """Return how far sums of products of codes can be from exact ones, fp64 ``[M, N]``.

    Each chunk of K is summed by instructions with 13 fraction bits, and the chunks in fp32.
    """
    left, right = (Factor.of_codes(codes, FORMATS["f8E4M3FN"]) for codes in (x, w))
    bound = torch.zeros(len(x), len(w), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], _CHUNK):
        parts = [_columns(factor, start) for factor in (left, right)]
        bound += error_bound(*parts, HOPPER_FP8)
    total = left.values.abs() @ right.values.abs().T
    return bound + -(-x.shape[1] // _CHUNK) * 2.0**-24 * (total + bound)


def _columns(factor: Factor, start: int) -> Factor:
    part = slice(start, start + _CHUNK)
    values, exponents = factor.values[:, part], factor.exponents[:, part]
    return Factor(values, exponents, factor.scale_values, factor.scale_exponents, values.shape[1])


def in_e4m3(values: Tensor) -> Tensor:
    return encode(values, FORMATS["f8E4M3FN"])


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_are_within_the_bound_of_fp64(
    folder: Path, shape: tuple[int, int], name: str, output: torch.dtype
) -> None:
    n, k = shape
    activation = ACTIVATIONS[name]
    weight, bias = normal(n, k), normal(n, 1)[:, 0]
    linear = linear_of(folder, weight, bias, activation, output)
    w_codes, (w_scale,) = quantize(weight, WEIGHT)
    w = decode(w_codes, WEIGHT.format).to(CUDA)
    for m in ROWS if k < 4096 else ROWS[:4]:
        x_codes, (x_scale,) = quantize(normal(m, k), activation)
        x = decode(x_codes, activation.format).to(CUDA)
        with poisoned():
            prepared = linear.prepare_codes([x_codes.to(CUDA), x_scale.to(CUDA)])
            found = linear.multiply(prepared)
            again = linear.multiply(prepared)
        assert found.dtype == output
        assert found.shape == (m, n)
        assert torch.equal(found, again)
        scale = x_scale.to(CUDA).double() * w_scale.to(CUDA).double().T
        exact = x.double() @ w.double().T * scale + bias.to(CUDA).double()
        # Four operations of the epilogue, and the rounding of the result.
        size = x.double().abs() @ w.double().abs().T * scale + bias.to(CUDA).double().abs()
        bound = bound_of(in_e4m3(x), in_e4m3(w)) * scale + 2.0**-22 * size
        bound += torch.finfo(output).eps / 2 * (exact.abs() + bound)
        error = (found.double() - exact).abs()
        assert bool((error <= bound).all()), f"M={m}: {float((error / bound).max())} of the bound"
        print(f"M={m} N={n} K={k} {name} {output}: {float(error.norm() / exact.norm()):.2e}")


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("m", [16, 160])
def test_sums_are_those_of_the_model_of_the_tensor_core(folder: Path, m: int, name: str) -> None:
    n, k = 128, 1024
    activation = ACTIVATIONS[name]
    weight = normal(n, k)
    linear = linear_of(folder, weight, None, activation, torch.float32)
    w_codes, (w_scale,) = quantize(weight, WEIGHT)
    x_codes, _ = quantize(normal(m, k), activation)
    ones = torch.ones(m, 1, device=CUDA)
    found = linear.multiply(linear.prepare_codes([x_codes.to(CUDA), ones]))
    parts = [in_e4m3(decode(c, o.format)).to(CUDA) for c, o in
             ((x_codes, activation), (w_codes, WEIGHT))]  # fmt: skip
    sums = torch.zeros(m, n, device=CUDA)
    for start in range(0, k, _CHUNK):
        chunk = [Factor.of_codes(c[:, start : start + _CHUNK], FORMATS["f8E4M3FN"]) for c in parts]
        sums += tensor_core_gemm(*chunk, HOPPER_FP8)
    assert torch.equal(found, sums * w_scale.to(CUDA).view(1, -1))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_is_added_before_results_are_rounded(
    folder: Path, shape: tuple[int, int], name: str
) -> None:
    n, k = shape
    activation, weight, bias = ACTIVATIONS[name], normal(n, k), normal(n, 1)[:, 0]
    wide, *adding = (
        linear_of(folder, weight, bias, activation, output, kind)
        for output, kind in (
            (torch.float32, ""),
            (torch.float32, ADDS),
            (torch.bfloat16, ADDS),
        )
    )
    for m in ROWS if k < 4096 else ROWS[:4]:
        x = [part.to(CUDA) for part in _quantized(normal(m, k), activation)]
        residual = normal(n, m).T.bfloat16().to(CUDA)  # with gaps
        exact = wide.multiply(wide.prepare_codes(x)) + residual.float()
        for linear in adding:
            with poisoned():
                found = linear.multiply(linear.prepare_codes(x), residual.to(linear._dtype))
            assert torch.equal(found, exact.to(linear._dtype)), (m, linear._dtype)
        own = adding[0].multiply(adding[0].prepare_codes(x))
        assert torch.equal(own, wide.multiply(wide.prepare_codes(x)))


def test_leading_axes_and_no_rows(folder: Path) -> None:
    activation = ACTIVATIONS["a6"]
    linear = linear_of(folder, normal(77, 200), None, activation, torch.bfloat16)
    x = [part.to(CUDA) for part in _quantized(normal(2, 5, 200), activation)]
    y = linear.multiply(linear.prepare_codes(x))
    flat = linear.multiply(linear.prepare_codes([part.flatten(0, 1) for part in x]))
    assert y.shape == (2, 5, 77)
    assert torch.equal(y.flatten(0, 1), flat)
    assert linear.multiply(linear.prepare_codes([part[:0] for part in x])).shape == (0, 5, 77)


def _quantized(x: Tensor, operand: Operand) -> list[Tensor]:
    codes, scales = quantize(x, operand)
    return [codes, *scales]


def test_a_token_does_not_depend_on_its_batch(folder: Path) -> None:
    activation = ACTIVATIONS["a8"]
    linear = linear_of(folder, normal(256, 4096), None, activation, torch.float32)
    x = [part.to(CUDA) for part in _quantized(normal(DECODE_ROWS + 30, 4096), activation)]
    whole = linear.multiply(linear.prepare_codes(x))
    for rows in (slice(0, 1), slice(3, 20), slice(0, DECODE_ROWS)):
        part = linear.multiply(linear.prepare_codes([piece[rows] for piece in x]))
        assert torch.equal(part, whole[rows])


def test_codes_may_begin_anywhere(folder: Path) -> None:
    linear = linear_of(folder, normal(64, 128), None, ACTIVATIONS["a6"], torch.float32)
    x = linear.prepare_codes([p.to(CUDA) for p in _quantized(normal(4, 128), ACTIVATIONS["a6"])])
    storage = torch.zeros(4 * 128 + 3, dtype=torch.uint8, device=CUDA)
    odd = storage[3:].view(4, 128).copy_(x.codes)
    assert torch.equal(linear.multiply(x._replace(codes=odd)), linear.multiply(x))


def test_errors_of_launches_are_raised(folder: Path) -> None:
    linear = linear_of(folder, normal(64, 128), None, ACTIVATIONS["a6"], torch.float32)
    x = linear.prepare_codes([p.to(CUDA) for p in _quantized(normal(4, 128), ACTIVATIONS["a6"])])
    with pytest.raises(RuntimeError, match="does not hold 4 rows of 128 codes"):
        linear.multiply(x._replace(codes=x.codes[:, :100].contiguous()))
    with pytest.raises(RuntimeError, match="run on a GPU"):
        linear.multiply(x._replace(codes=x.codes.cpu()))


def models(folder: Path, name: str) -> tuple[CompiledModel, CompiledModel, CompiledModel]:
    """Return a model on the CPU, on the GPU without kernels, and with them."""
    path = folder / f"{name}.fpc"
    plain = load(path, device="cuda", kernels=False)
    return load(path), plain, load(path, device="cuda", trust=True, strict=True)


def input_of(name: str, rows: int) -> Tensor:
    if name == "llama":
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(0, 90, (1, rows), generator=generator)
    return normal(rows, 200)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_those_of_the_cpu(folder: Path, name: str) -> None:
    cpu, plain, fast = models(folder, name)
    spec = cpu.artifact.plan.signature.outputs
    for rows in (1, 16, 60):
        x = input_of(name, rows)
        expected = flatten(spec, cpu(x), "cpu")
        reference = flatten(spec, plain(x.to(CUDA)), "plain")
        found = flatten(spec, fast(x.to(CUDA)), "fast")
        for e, r, f in zip(expected, reference, found, strict=True):
            # One activation that rounds the other way costs some decibels, on any device.
            assert sqnr_db(e, f.cpu()) > 20, (sqnr_db(e, r.cpu()), sqnr_db(r, f))
    report = fast.verify()
    assert report.ok, report


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_graph_replays_the_same(folder: Path, name: str) -> None:
    executor = load(folder / f"{name}.fpc", device="cuda", trust=True)._ready()
    first, second = (input_of(name, 16).to(CUDA) for _ in range(2))
    second = second.flip(-1).contiguous()
    leaf, own = first.clone(), executor.fresh()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries of torch get their workspaces before
        own.run_leaves([leaf])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = own.run_leaves([leaf])
    for x in (second, first):
        leaf.copy_(x)
        graph.replay()
        expected = executor.fresh().run_leaves([x])
        assert all(map(torch.equal, expected, outputs))


def test_streams_do_not_disturb_each_other(folder: Path) -> None:
    executor = load(folder / "mlp-a6.fpc", device="cuda", trust=True)._ready()
    inputs = [input_of("mlp-a6", rows).to(CUDA) for rows in (3, 40, 60)]
    expected = [executor.fresh().run_leaves([x]) for x in inputs]
    torch.cuda.synchronize()
    found = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(executor.fresh().run_leaves([x]))
    torch.cuda.synchronize()
    for e, f in zip(expected, found, strict=True):
        assert all(map(torch.equal, e, f))


def test_nan_is_an_error_that_names_the_layer(folder: Path) -> None:
    model = load(folder / "mlp-a6.fpc", device="cuda", trust=True)
    x = normal(4, 200).to(CUDA)
    before = model(x)["logits"]
    bad = x.clone()
    bad[2, 3] = torch.inf
    with pytest.raises(NumericsError, match="layer 'up': input holds NaN"):
        model(bad)
    assert torch.equal(model(x)["logits"], before)


def test_kernels_of_others_are_not_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # there is no nvcc
    with pytest.raises(ArtifactError, match="trust=True"):
        load(folder / "mlp-a8.fpc", device="cuda")


def test_quantizers_are_kernels(folder: Path) -> None:
    """Codes and scales that kernels make are those of numerics."""
    kernels = kernels_of(folder, torch.float32)
    for activation in ACTIVATIONS.values():
        linear = linear_of(folder, normal(64, 200), None, activation, torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(33, 200).to(dtype)
            status = torch.zeros(1, dtype=torch.int32, device=CUDA)
            with poisoned():
                status.zero_()
                found = kernels.quantizers.quantize(linear.kind, x.to(CUDA), status)
            assert found is not None
            expected = linear.prepare_codes([p.to(CUDA) for p in _quantized(x, activation)])
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.token_scale, expected.token_scale)
            assert int(status) == 0


def test_dequantized_inputs_give_the_same_layer(folder: Path) -> None:
    """The whole product against values, not codes: a mistake in both tables would show here."""
    activation = ACTIVATIONS["a6"]
    weight = normal(96, 256)
    linear = linear_of(folder, weight, None, activation, torch.float32)
    codes, scales = quantize(weight, WEIGHT)
    w = dequantize(codes, scales, WEIGHT, torch.float64)
    x = normal(8, 256)
    x_codes, x_scales = quantize(x, activation)
    values = dequantize(x_codes, x_scales, activation, torch.float64)
    found = linear.multiply(linear.prepare_codes([x_codes.to(CUDA), x_scales[0].to(CUDA)]))
    assert sqnr_db(values @ w.T, found.cpu().double()) > 90
