"""Compiled models under torch.compile: native kernels in one graph, and nothing left behind."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import NumericsError, RunError
from fpcompiler.native import library
from fpcompiler.numerics import quantize, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import compiled_rest
from fpcompiler.runtime.compare import Distance
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.inputs import bind
from fpcompiler.runtime.native import NativeLinear
from fpcompiler.runtime.native_ops import TracedLinear
from fpcompiler.runtime.native_steps import NativeLayer
from fpcompiler.runtime.program import attention
from tests.models import normal, own_cases

pytestmark = pytest.mark.skipif(library() is None, reason="needs the native library")

W4 = "e2m1@row:f32/block32:e8m0"
X = normal(2, 5, 64)


class Block(nn.Module):
    """Residual, norm and GELU; the second layer's input is read in floating point as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(self.norm(x)))
        result: Tensor = x + self.down(h).tanh() + h.sum(-1, keepdim=True)
        return result


def compiled(scheme: str = "w4a6") -> fpcompiler.CompiledModel:
    return fpcompiler.compile(Block().eval(), scheme, example_inputs=(X,))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("vit", "w4a6"),
        ("cached", "nvfp4"),
        pytest.param("cached", "w4a16", marks=pytest.mark.slow),
        pytest.param("llama", "w4a6", marks=pytest.mark.slow),
        pytest.param("dit", "w4a8", marks=pytest.mark.slow),
    ],
)
def test_a_traced_model_gives_the_bits_of_its_steps(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operators of torch, and the same kernels, whatever lies in between."""
    monkeypatch.setattr(attention, "MOST_QUERIES", 0)  # The graph has torch's attention.
    model, args, kwargs = own_cases()[name].make()
    made = fpcompiler.compile(model, scheme, example_inputs=args, example_kwargs=kwargs)
    artifact = made.artifact
    traced, plain = (Executor(artifact.plan, artifact.tensors) for _ in range(2))
    plain._programs = None
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    leaves = bind(artifact.plan.signature, args, kwargs)
    run = torch.compile(compiled_rest.own_code(traced.run_leaves), backend=backend, fullgraph=True)
    for _ in range(2):
        for ours, theirs in zip(run(leaves), plain.run_leaves(leaves), strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert all(map(torch.equal, traced._state.values(), plain._state.values()))
    layers = [i for i in plain._code if isinstance(i.function, NativeLayer)]
    assert targets.count(torch.ops.fpc.native_multiply) == len(layers) > 0
    assert torch.ops.fpc.linear not in targets


@pytest.fixture
def layer() -> TracedLinear:
    weight, inputs = Operand.parse(W4), Operand.parse("e2m3@token:f32/block32:e8m0")
    packed, scales = quantize_packed(normal(24, 64), weight)
    linear = NativeLinear([packed, *scales], torch.ones(24), inputs, weight, 64, layer="up")
    return TracedLinear.of(linear, "up")


def test_the_operators_are_good_citizens_of_torch(layer: TracedLinear) -> None:
    own = layer.about, layer.row_bytes, layer.operand, "up"
    codes, scales = quantize(X, Operand.parse(layer.operand))
    norm = X, torch.ones(64), None, None, None, "rms_norm", 1e-6
    strided = X, None, None, torch.ones(2, 5, 64, 2)[..., 0], None, "silu_mul", 0.0
    operators = torch.ops.fpc
    torch.library.opcheck(operators.native_prepare.default, (X, *own))
    torch.library.opcheck(operators.native_prepare_codes.default, (codes, [*scales], *own))
    for values in (norm, strided):
        torch.library.opcheck(operators.native_prepare_produced.default, (*values, *own))
    rows = layer.prepare(X, layer.operand, "up").rows
    assert torch.equal(rows, operators.native_prepare_codes(codes, [*scales], *own))
    for dtype in (torch.float32, torch.bfloat16):
        weights = layer.data, layer.scale, layer.bias
        arguments = (rows, layer.about, *weights, 24, dtype, "up")
        torch.library.opcheck(operators.native_multiply.default, arguments)
        y, residual = operators.native_multiply(*arguments), normal(2, 5, 24).to(dtype)
        added = operators.native_multiply(*arguments, residual)
        assert torch.equal(added, y + residual)
        torch.library.opcheck(operators.native_multiply.default, (*arguments, residual))


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows_that_are_ready_take_the_same_bytes_each(layer: TracedLinear, rows: int) -> None:
    """What the fake implementations and the shape of such tensors rest on."""
    y = layer([layer.prepare(normal(3, rows, 64), layer.operand, "up")], torch.float32)
    assert y.shape == (3, rows, 24)
    weight, inputs = Operand.parse(W4), Operand.parse(layer.operand)
    packed, scales = quantize_packed(normal(24, 64), weight)
    linear = NativeLinear([packed, *scales], None, inputs, weight, 64)
    assert linear.prepared_bytes(rows) == rows * layer.row_bytes


def test_copies_of_the_weights_give_the_same_result_wherever_they_lie(layer: TracedLinear) -> None:
    rows = layer.prepare(X, layer.operand, "up").rows
    expected = layer([layer.prepare(X, layer.operand, "up")], torch.float32)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)

    weights = moved(layer.data), layer.scale.clone(), layer.bias
    found = torch.ops.fpc.native_multiply(
        moved(rows), layer.about, *weights, 24, torch.float32, "up"
    )
    assert torch.equal(found, expected)


def test_tensors_that_do_not_belong_together_are_refused(layer: TracedLinear) -> None:
    rows = layer.prepare(X, layer.operand, "up").rows
    weights = layer.data, layer.scale, layer.bias
    own = layer.about, layer.row_bytes, layer.operand, "up"
    multiply, prepare = torch.ops.fpc.native_multiply, torch.ops.fpc.native_prepare
    wrong = [
        (rows[..., :-1], layer.about, *weights, 24, torch.float32, "up"),
        (rows, layer.about[1:], *weights, 24, torch.float32, "up"),
        (rows, layer.about, layer.data[64:], *weights[1:], 24, torch.float32, "up"),
        (rows, layer.about, layer.data, layer.scale[:8], layer.bias, 24, torch.float32, "up"),
        (rows, layer.about, layer.data, layer.scale, None, 24, torch.float32, "up"),
        (rows, layer.about, *weights, 25, torch.float32, "up"),
        (rows, layer.about, *weights, 24, torch.float64, "up"),
    ]
    for arguments in wrong:
        with pytest.raises(NumericsError, match="layer 'up': the layer was made for another"):
            multiply(*arguments)
    for arguments in ((X[..., 1:], *own), (X.double(), *own), (X, own[0], 64, *own[2:])):
        with pytest.raises(NumericsError, match="layer 'up': the layer was made for another"):
            prepare(*arguments)


@pytest.fixture(scope="module")
def rest() -> fpcompiler.CompiledModel:
    """A model of which Inductor has compiled the rest."""
    model = compiled()
    model.compile_rest()
    model(X)
    return model


def test_inductor_compiles_the_rest(rest: fpcompiler.CompiledModel) -> None:
    """Within 40 dB, as replays on other machines are.

    Other last bits of what is quantized make single activations take the neighbouring code.
    """
    plain = compiled()
    for x in (X, normal(7, 5, 64), normal(1, 5, 64)):
        distance = Distance()
        distance.add(plain(x), rest(x))
        assert distance.sqnr_db > 40


def test_errors_in_a_compiled_rest_are_those_of_the_model(rest: fpcompiler.CompiledModel) -> None:
    x = X.clone()
    x[0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="layer 'up': input holds NaN/Inf"):
        rest(x)
    with pytest.raises(RunError, match="Argument 'x': expected the shape"):
        rest(normal(2, 5, 63))


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    model.compile_rest()
    settings = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(settings),  # type: ignore[attr-defined]
        pytest.raises(RunError, match=r"no C\+\+ compiler.*apt-get install g\+\+"),
    ):
        model(X)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile only trace: what is tested has nothing to do with Inductor."""
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(compiled_rest.torch, "compile", traced)


def test_any_number_of_models(quick: None) -> None:
    """torch.compile gives up at the ninth version of one function."""
    cpu = torch.device("cpu")
    runs = [compiled_rest.compile_rest(lambda leaves, i=i: [leaves[0] + i], cpu) for i in range(12)]
    assert [int(run([torch.zeros(())])[0]) for run in runs] == list(range(12))


def test_copies_are_compiled_too(quick: None) -> None:
    model = compiled()
    model.compile_rest()
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        assert other._ready()._compiled is not None


def test_weights_go_with_their_model(quick: None) -> None:
    model = compiled()
    model.compile_rest()
    model(X)
    functions = [i.function for i in model._ready()._code]
    held = [weakref.ref(f.traced.data) for f in functions if isinstance(f, NativeLayer)]
    assert len(held) == 2
    del model, functions
    gc.collect()
    assert [reference() for reference in held] == [None, None]
