"""insert-quantize: which operations become quantized layers, their names, and why others not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler import ir, numerics
from fpcompiler.errors import PassError
from fpcompiler.operand import Operand
from tests.models import LlamaBlock, SharedBlock, TiedLanguageModel, ViTBlock, normal
from tests.programs import (
    Function,
    count,
    evaluate,
    kept_reasons,
    program_of,
    quantized,
    run_passes,
)

FINE = "w=f8E4M3FN@row:f32,a=none,skip=none"
"""Weights only, so that a layer can be compared with torch on the dequantized weight."""


def layers(program: ir.Program) -> list[str]:
    return [str(op.attributes["layer"]).strip('"') for op in program.operations("fpq.linear")]


def rounded(weight: Tensor, text: str = "f8E4M3FN@row:f32") -> Tensor:
    """Return the values that a weight [N, ...] has once it is quantized as [N, K]."""
    operand = Operand.parse(text)
    rows = weight.detach().flatten(1)
    return numerics.dequantize(*numerics.quantize(rows, operand), operand).view(weight.shape)


def close(result: Tensor, expected: Tensor, magnitude: Tensor, k: int) -> bool:
    """Whether two sums of k products agree: each product and each sum is rounded once, twice."""
    return bool(((result - expected).abs() <= 2 * (k + 4) * 2**-24 * magnitude + 1e-30).all())


def test_one_quantize_is_shared_by_q_k_v_and_one_by_gate_and_up() -> None:
    program = program_of(LlamaBlock(), normal(1, 4, 64))
    run_passes(program, "cse,normalize,insert-quantize")
    assert count(program, "fpq.linear") == 7
    assert count(program, "fpq.quantize") == 14  # a weight and an input each
    run_passes(program, "cse")
    assert count(program, "fpq.quantize") == 7 + 4  # inputs: q k v; o; gate up; down
    inputs = {
        str(op.attributes["layer"]): op.operands[0] for op in program.operations("fpq.linear")
    }
    assert inputs['"q_proj"'] == inputs['"k_proj"'] == inputs['"v_proj"']
    assert inputs['"gate_proj"'] == inputs['"up_proj"']
    assert inputs['"q_proj"'] != inputs['"gate_proj"']


def test_layers_of_different_formats_do_not_share() -> None:
    program = quantized(LlamaBlock(), normal(1, 4, 64), scheme="w4a6; k_proj: w4a8; up_proj: w4a16")
    # Inputs: q v; k; o; gate; down. The rule leaves the input of up_proj as it is.
    assert count(program, "fpq.quantize") == 7 + 5
    (up,) = (
        op for op in program.operations("fpq.linear") if '"up_proj"' in str(op.attributes["layer"])
    )
    assert str(up.operands[0].type) == "!torch.vtensor<[?,?,64],f32>"


def test_rules_and_skip_decide_and_the_reason_is_kept() -> None:
    model = nn.Sequential(
        nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
    )
    program = quantized(model, normal(2, 32), scheme="w4a6,skip=0|1; 1: w4a8; 2: skip")
    assert layers(program) == ["1", "3"]
    rules = {
        str(op.attributes.get("fpq.layer") or op.attributes["layer"]): str(
            op.attributes["fpq.rule"]
        )
        for op in program.operations()
        if "fpq.rule" in op.attributes
    }
    assert rules == {
        '"0"': '"skip=0"', '"1"': '"rule 1"', '"2"': '"rule 2"', '"3"': '"base"',
    }  # fmt: skip
    reason = "the scheme keeps it in high precision"
    assert kept_reasons(program) == {"0": reason, "2": reason}


def linear(self: Function, x: Tensor) -> Tensor:
    return functional.linear(x, self.w, self.b)


def addmm(self: Function, x: Tensor) -> Tensor:
    return torch.addmm(self.b, x, self.w)


def matmul(self: Function, x: Tensor) -> Tensor:
    return x @ self.w


def expression(self: Function, x: Tensor) -> Tensor:
    return functional.linear(x, (self.w * self.g.exp()).t())


def slices(self: Function, x: Tensor) -> Tensor:
    first, second = self.w.chunk(2, 0)
    return functional.linear(x, first) + functional.linear(x, second)


FUNCTIONS = {
    "linear": (linear, {"w": normal(8, 40), "b": normal(8)}, (3, 40), lambda m: m.w, ["w"]),
    "addmm": (addmm, {"w": normal(40, 8), "b": normal(8)}, (3, 40), lambda m: m.w.t(), ["w"]),
    "matmul": (matmul, {"w": normal(40, 8)}, (2, 3, 40), lambda m: m.w.t(), ["w"]),
    "vector": (matmul, {"w": normal(40, 8)}, (40,), lambda m: m.w.t(), ["w"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_matrix_product_with_a_constant_is_a_layer(name: str) -> None:
    function, parameters, shape, weight, names = FUNCTIONS[name]
    model, x = Function(function, **parameters), normal(*shape, seed=9)
    program = quantized(model, x, scheme=FINE)
    assert layers(program) == names
    assert kept_reasons(program) == {}
    w = rounded(weight(model)).double()
    bias = model.b.double() if "b" in parameters else 0.0
    (result,) = evaluate(program, x)
    magnitude = x.double().abs() @ w.abs().T + 8
    assert close(result, x.double() @ w.T + bias, magnitude, 40)


def test_a_weight_that_is_computed_from_constants_is_a_weight() -> None:
    model = Function(expression, w=normal(40, 8), g=normal(1, 8))
    program = quantized(model, normal(3, 40), scheme=FINE)
    assert count(program, "fpq.linear") == 1
    x = normal(3, 40, seed=4)
    w = rounded((model.w * model.g.exp()).t()).double()
    (result,) = evaluate(program, x)
    assert close(result, x.double() @ w.T, x.double().abs() @ w.abs().T, 40)


def test_parts_of_a_weight_are_layers_of_their_own() -> None:
    model, x = Function(slices, w=normal(16, 40)), normal(3, 40)
    program = quantized(model, x, scheme=FINE)
    assert count(program, "fpq.linear") == 2
    (result,) = evaluate(program, x)
    w = rounded(model.w).double()
    expected = x.double() @ (w[:8] + w[8:]).T
    assert close(result, expected, x.double().abs() @ (w[:8].abs() + w[8:].abs()).T, 40)


CONVOLUTIONS = {
    "2d": (nn.Conv2d(3, 8, 3), (2, 3, 9, 7), (1, 3, 5, 12)),
    "2d-patches": (nn.Conv2d(3, 8, 4, 4, bias=False), (2, 3, 8, 16), (5, 3, 12, 4)),
    "2d-all": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
        (2, 4, 11, 13),
        (3, 4, 6, 9),
    ),
    "1d": (nn.Conv1d(5, 8, 3), (2, 5, 20), (1, 5, 3)),
    "1d-all": (nn.Conv1d(5, 8, 3, stride=2, padding=1, dilation=2), (2, 5, 20), (4, 5, 33)),
    "1d-as-linear": (nn.Conv1d(5, 8, 1), (2, 5, 20), (3, 5, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_gemm_over_its_windows(name: str) -> None:
    convolution, *shapes = CONVOLUTIONS[name]
    model = nn.Sequential(convolution)
    sizes = dict.fromkeys((0, *range(2, len(shapes[0]))), torch.export.Dim.AUTO)
    program = quantized(model, normal(*shapes[0]), scheme=FINE, dynamic={"input": sizes})
    assert layers(program) == ["0"]
    assert count(program, "torch.aten.im2col") == 1
    w = rounded(convolution.weight)
    f = functional.conv1d if w.ndim == 3 else functional.conv2d
    options = (convolution.stride, convolution.padding, convolution.dilation)
    bias = None if convolution.bias is None else convolution.bias.detach()
    for number, shape in enumerate(shapes):
        x = normal(*shape, seed=number)
        (result,) = evaluate(program, x)
        expected = f(x, w, bias, *options)
        magnitude = f(x.abs(), w.abs(), None if bias is None else bias.abs(), *options)
        assert result.shape == expected.shape
        assert close(result, expected, magnitude, w[0].numel())


def test_bfloat16_convolutions_keep_their_dtype() -> None:
    model, x = nn.Conv2d(3, 8, 2, 2).bfloat16(), normal(2, 3, 4, 4).bfloat16()
    program = quantized(model, x)
    (result,) = evaluate(program, x)
    assert result.dtype is torch.bfloat16
    assert (result - model(x)).norm() < 0.3 * model(x).norm()


def bilinear_weight(self: Function, x: Tensor) -> Tensor:
    return torch.bmm(x, self.w)


def halved(self: Function, x: Tensor) -> Tensor:
    return torch.addmm(self.b, x, self.w, beta=0.5)


def dynamic(self: Function, x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2)


KEPT = {
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6), "it is a grouped convolution"),
    "unbatched": (nn.Conv2d(4, 8, 3), (4, 6, 6), "the input has no batch axis"),
    "same": (
        nn.Conv2d(4, 8, 3, padding="same"),
        (2, 4, 6, 6),
        "padding given as a text has no GEMM form yet; give it as numbers",
    ),
    "transposed": (
        nn.ConvTranspose2d(4, 8, 3),
        (2, 4, 6, 6),
        "a transposed convolution has no GEMM form yet",
    ),
    "3d": (
        nn.Conv3d(2, 4, 2),
        (1, 2, 4, 4, 4),
        "there is no GEMM form of this convolution yet",
    ),
    "beta": (
        Function(halved, w=normal(40, 8), b=normal(8)),
        (3, 40),
        "beta and alpha are 0.5 and 1, not 1",
    ),
    "one-bias": (
        Function(linear, w=normal(8, 40), b=normal(1)),
        (3, 40),
        "what is added is not a bias with one number for each output",
    ),
    "stack": (
        Function(matmul, w=normal(2, 40, 8)),
        (2, 3, 40),
        "the weight has 3 axes; only a matrix can become a GEMM",
    ),
    "batched": (
        Function(bilinear_weight, w=normal(2, 40, 8)),
        (2, 3, 40),
        "a GEMM with a weight for each batch is not supported yet",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_become_a_gemm_is_kept_with_the_reason(name: str) -> None:
    model, shape, reason = KEPT[name]
    x = normal(*shape)
    program = quantized(model, x)
    assert list(kept_reasons(program).values()) == [reason]
    assert count(program, "fpq.linear") == 0
    (result,) = evaluate(program, x)
    assert torch.equal(result, model(x))


def test_experts_are_kept_with_the_reason(captured) -> None:
    from tests.programs import import_named

    program = import_named(captured("hf-mixtral"))
    run_passes(program, "cse,normalize,insert-quantize")
    reasons = kept_reasons(program)
    experts = {name for name in reasons if "experts" in name}
    assert len(experts) == 4  # gate_up and down of two layers
    assert {reasons[name] for name in experts} == {"a grouped GEMM of experts is not supported yet"}


def test_a_product_of_two_activations_is_no_layer() -> None:
    program = quantized(Function(dynamic), normal(3, 40))
    assert count(program, "fpq.linear", "fpq.quantize") == 0
    assert kept_reasons(program) == {}


def test_a_shared_module_is_one_layer_with_one_weight() -> None:
    program = quantized(SharedBlock(), normal(1, 4, 64))
    names = layers(program)
    assert names.count("block.fc1") == 2
    weights = {op.operands[1] for op in program.operations("fpq.linear")}
    assert len(weights) == len(set(names)) == 5
    run_passes(program, "quantize-weights,symbol-dce")
    codes = [name for name in program.weights if name.endswith(".codes")]
    assert sorted(codes) == sorted(f"{name}.weight.codes" for name in set(names))


def test_a_tied_head_is_quantized_and_its_embedding_is_not() -> None:
    ids = torch.arange(8).view(2, 4)
    program = quantized(TiedLanguageModel(), ids, scheme="w4a6,skip=none")
    assert "lm_head" in layers(program)
    assert kept_reasons(program) == {"embed": "an embedding is a table, not a GEMM"}
    run_passes(program, "quantize-weights,canonicalize,symbol-dce")
    (table,) = {"embed.weight", "lm_head.weight"} & set(program.weights)
    assert program.weights[table].dtype is torch.float32
    assert program.weights["lm_head.weight.codes"].shape == (96, 32)
    assert f"global private @{table}(#ml_program.extern) : tensor<96x64xf32>" in ir.print_program(
        program
    )


def test_names_stand_for_weights_where_one_module_has_several() -> None:
    model = nn.MultiheadAttention(32, 2, batch_first=True)
    x = normal(2, 5, 32)

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    assert layers(quantized(Self(), x)) == ["attention.in_proj_weight", "attention.out_proj"]


def test_stages_are_checked() -> None:
    program = program_of(ViTBlock(), normal(1, 4, 64))
    with pytest.raises(PassError) as caught:
        run_passes(program, "insert-quantize")
    assert str(caught.value) == (
        "insert-quantize needs a program at stage normalized, but there it is at stage captured. "
        "Put the pass that leads there before it, or leave it out."
    )


@pytest.mark.parametrize("method", ["rtn", "gptq", "adaround-layers"])
def test_weights_that_are_parts_of_one_tensor(method: str) -> None:
    """Cross-attention cuts one tensor in three, by one operation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    generator = torch.Generator().manual_seed(1)
    calls = [
        tuple(torch.randn(4, length, 32, generator=generator) for length in (40, 30, 30))
        for _ in range(2)
    ]
    scheme = "w=f8E4M3FN@row:f32,a=none,skip=none"
    compiled = fpcompiler.compile(model, scheme, calibration=calls, method=method, dynamic=None)
    with torch.no_grad():
        (result, _), (wanted, _) = compiled(*calls[0]), model(*calls[0])
    assert float((result - wanted).norm() / wanted.norm()) < 0.05
    if method != "rtn":  # Each part has a note of its own.
        assert sum("round" in row.reason for row in compiled.plan().rows) == 4


def test_an_input_of_unknown_length_keeps_its_layer() -> None:
    model = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    calls = tuple(normal(4, length, 32) for length in (40, 30, 30))
    compiled = fpcompiler.compile(model, "w4a16", example_inputs=calls)
    rows = {row.name: row for row in compiled.plan().rows}
    assert "try dynamic=None" in rows["out_proj"].reason
    assert not rows["out_proj"].quantized
