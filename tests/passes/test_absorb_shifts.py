"""Where ``preshift`` puts powers of two, and that they change nothing but exponents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fpcompiler.calibration import input_groups
from fpcompiler.errors import PassError
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.numerics.powers import exact_power
from tests.models import normal
from tests.passes.shifting import (
    MODELS,
    ROW,
    TENSOR,
    notes,
    program_of,
    run,
    uneven,
    uneven_input,
    without_quantization,
)
from tests.passes.tiny import Attention, Mlp, tiny
from tests.programs import count, evaluate, quantized


@pytest.mark.parametrize("absorb", ["true", "false"])
@pytest.mark.parametrize("scheme", [ROW, TENSOR])
@pytest.mark.parametrize("name", MODELS)
def test_without_quantization_the_program_computes_the_same_bits(
    name: str, scheme: str, absorb: str
) -> None:
    _, data = MODELS[name]
    x, program = data(1), program_of(name, scheme)
    expected = without_quantization(program, x)
    (result,) = run(program, f"preshift{{absorb={absorb}}}", data(0))
    assert result.statistics["largest k"] >= 1
    assert torch.equal(without_quantization(program, x), expected)


@pytest.mark.parametrize("scheme", [ROW, TENSOR])
@pytest.mark.parametrize("name", MODELS)
def test_absorbed_powers_give_the_bits_of_a_multiplication(name: str, scheme: str) -> None:
    _, data = MODELS[name]
    x = data(1)
    results = []
    for absorb in ("true", "false"):
        program = program_of(name, scheme)
        run(program, f"preshift{{absorb={absorb}}},quantize-weights", data(0))
        results += evaluate(program, x)
    assert torch.equal(*results)


def places(name: str) -> dict[str, str]:
    program = program_of(name)
    run(program, "preshift", MODELS[name][1](0))
    return {layer: note.split(", ")[2].split(";")[0] for layer, note in notes(program).items()}


def test_norms_and_the_rows_before_a_gated_product_take_the_powers() -> None:
    norm, inner = "in attention_norm.weight", "in inner_norm.weight"
    assert places("llama") == {
        "q_proj": norm,
        "k_proj": norm,
        "v_proj": norm,
        "o_proj": "by a multiplication",  # two heads share their values
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": "in the rows of up_proj",
    }


def test_a_layer_norm_takes_them_in_weight_and_bias() -> None:
    found = places("attention")
    assert {found[layer] for layer in "qkv"} == {"in norm.weight and norm.bias"}


class Values(nn.Module):
    """Attention whose values are read elsewhere too, or belong to several heads."""

    def __init__(self, heads: int = 2, returned: bool = False) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, heads * 16), nn.Linear(32, heads * 16)
        self.heads, self.returned = heads, returned

    def forward(self, x: Tensor) -> Tensor:
        layers = ((self.q, 2), (self.k, self.heads), (self.v, self.heads))
        q, k, v = (f(x).view(*x.shape[:2], heads, 16).transpose(1, 2) for f, heads in layers)
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != 2)
        y = self.out(y.transpose(1, 2).contiguous().view(*x.shape[:2], 32))
        return y + v.transpose(1, 2).flatten(2) if self.returned else y


@pytest.mark.parametrize(
    ("heads", "returned", "place"),
    [
        (2, False, "in the rows of v"),
        (1, False, "by a multiplication"),
        (2, True, "by a multiplication"),
    ],
)
def test_values_take_the_powers_of_what_attention_gives(
    heads: int, returned: bool, place: str
) -> None:
    model = Values(heads, returned).eval()
    with torch.no_grad():
        model.v.weight.mul_(exact_power(torch.arange(16) % 6 - 3).repeat(heads)[:, None])
    x = normal(2, 8, 32)
    program = quantized(model, x, scheme=TENSOR)
    expected = without_quantization(program, x)
    run(program, "preshift", x)
    assert notes(program)["out"].split(", ")[2].split(";")[0] == place
    assert torch.equal(without_quantization(program, x), expected)


def test_a_value_that_others_read_is_not_multiplied_where_it_is_made() -> None:
    assert places("bert") == {
        "up": "by a multiplication",  # the residual reads the norm too
        "down": "in the rows of up",  # through the rectifier
    }
    assert places("conv") == {"conv": "by a multiplication"}


class Last(nn.Module):
    """A head that reads the norm of the last token, and of tokens and channels exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.last, self.mixed = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.norm(x)[:, -1]), self.mixed(self.norm(x + 1).transpose(1, 2))


def test_only_other_axes_than_that_of_the_channels_may_change_on_the_way() -> None:
    x = normal(2, 16, 16) * exact_power(torch.arange(16) % 5)[:, None]
    model = tiny(Last)
    with torch.no_grad():
        model.norm.weight.mul_(exact_power(torch.arange(16) % 5))
    program = quantized(model, x, scheme=ROW, dynamic=None)
    run(program, "preshift", x)
    found = notes(program)
    assert "in norm.weight and norm.bias;" in found["last"]
    assert "by a multiplication;" in found["mixed"]


def test_gelu_lets_no_factor_through() -> None:
    program = quantized(uneven(Mlp), normal(4, 32), scheme=ROW)
    (result,) = run(program, "preshift", normal(4, 32))
    assert "inputs absorbed" not in result.statistics
    assert result.statistics["multiplications added"] == result.statistics["inputs shifted"]


class Rms(nn.Module):
    """A norm in fp32 with a cast before the layer, as mixed precision has it."""

    def __init__(self, dtype: torch.dtype, elementwise: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-6, elementwise_affine=elementwise)
        self.scale = nn.Parameter(exact_power(torch.arange(32) % 4))
        self.layer = nn.Linear(32, 16).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x * self.scale).to(self.layer.weight.dtype)
        return self.layer(y.flatten(0, 1))


@pytest.mark.parametrize(
    ("dtype", "elementwise", "place"),
    [
        (torch.float32, True, "in norm.weight"),
        (torch.bfloat16, True, "in norm.weight"),
        (torch.float16, True, "by a multiplication"),  # a cast may reach numbers that round more
        (torch.float32, False, "by a multiplication"),
    ],
)
def test_an_rms_norm_takes_them_through_views_and_exact_casts(
    dtype: torch.dtype, elementwise: bool, place: str
) -> None:
    x = normal(2, 8, 32)
    program = quantized(Rms(dtype, elementwise), x, scheme=ROW)
    expected = without_quantization(program, x)
    run(program, "preshift", x)
    assert notes(program)["layer"].split(", ")[2].split(";")[0] == place
    assert torch.equal(without_quantization(program, x), expected)


def test_a_layer_with_multiplied_rows_is_not_compared_with_the_model() -> None:
    program = program_of("llama")
    run(program, "preshift", normal(2, 8, 64))
    linears = program.operations("fpq.linear")
    named = {text_of(op.attributes["layer"]) for op in linears if "fpq.layer" in op.attributes}
    assert named == set(places("llama")) - {"up_proj"}


class Twice(nn.Module):
    """One layer for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_that_runs_twice_has_powers_for_each_input() -> None:
    x = uneven_input(16, 32)
    program = quantized(tiny(Twice), x, scheme=ROW)
    (plain,) = evaluate(program, x)
    expected = without_quantization(program, x)
    run(program, "preshift,quantize-weights", x)
    first, second = program.operations("fpq.linear")
    assert first.operands[1] != second.operands[1]
    (shifted,) = evaluate(program, x)
    assert (shifted - expected).norm() < (plain - expected).norm()


def test_layers_that_share_an_input_share_one_multiplication() -> None:
    program = program_of("attention")
    before = count(program, "torch.aten.mul.Tensor")
    (result,) = run(program, "preshift{absorb=false}", normal(2, 8, 32))
    assert result.statistics["layers shifted"] == 4
    assert count(program, "torch.aten.mul.Tensor") == before + 2
    assert len(input_groups(program)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_shifted_exactly_too(dtype: torch.dtype) -> None:
    x = normal(2, 8, 32).to(dtype)
    program = quantized(uneven(Attention).to(dtype), x, scheme=ROW)
    expected = without_quantization(program, x)
    (result,) = run(program, "preshift", x)
    assert result.statistics["inputs absorbed"] == 2  # the norm's, and those of attention
    assert torch.equal(without_quantization(program, x), expected)


class Extreme(nn.Module):
    """A product whose weight has no room for a larger exponent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3e38, 1.0, 1.0, 1.0]))
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.weight)


def test_a_power_that_is_out_of_range_is_found() -> None:
    x = torch.tensor([[1e-38, 20.0, 10.0, 5.0]])
    program = quantized(tiny(Extreme), x, scheme=ROW)
    with pytest.raises(PassError, match=r"^layer 'layer': its input times 2\*\*k") as caught:
        run(program, "preshift", x)
    assert "absorb=false" in str(caught.value)
    again = quantized(tiny(Extreme), x, scheme=ROW)
    (result,) = run(again, "preshift{absorb=false}", x)
    assert result.statistics["largest k"] == 2
