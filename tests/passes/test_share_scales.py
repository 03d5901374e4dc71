"""``share-scales`` and ``static-inputs``: what servers of NVFP4 checkpoints need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import IRError, OptionError, PassError
from fpcompiler.interop.checkpoints.layers import layer_weights
from fpcompiler.numerics.given import power_of_two, quantize_within
from fpcompiler.operand import Operand
from fpcompiler.passes import opt
from tests.models import normal

NVFP4 = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")
X = normal(6, 32)


class Pair(nn.Module):
    """Two layers that share an input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)
        self.c = nn.Linear(16, 8)
        self.b.weight.data *= 7

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))


def test_layers_that_share_an_input_share_a_power_of_two() -> None:
    model = Pair()
    compiled = fpcompiler.compile(
        model, f"w={NVFP4},a=none", example_inputs=X, share_scales=True, target="reference"
    )
    scales = {name: float(w.scales[0]) for name, w in layer_weights(compiled.artifact).items()}
    largest = max(float(layer.weight.detach().abs().max()) for layer in (model.a, model.b))
    assert scales["a"] == scales["b"] == float(power_of_two(largest, NVFP4))
    assert scales["c"] == float(power_of_two(float(model.c.weight.detach().abs().max()), NVFP4))
    assert "share-scales" in compiled.artifact.pipeline


@pytest.mark.parametrize("method", ["rtn", "gptq", "adaround-layers"])
def test_methods_round_with_the_shared_scale(method: str) -> None:
    compiled = fpcompiler.compile(
        Pair(), "nvfp4", example_inputs=X, share_scales=True, method=method, calibration=[X, X + 1]
    )
    weights = layer_weights(compiled.artifact)
    assert float(weights["a"].scales[0]) == float(weights["b"].scales[0])


def test_schemes_without_a_scale_of_the_tensor_stay_as_they_are() -> None:
    plain = fpcompiler.compile(Pair(), "w4a6", example_inputs=X)
    shared = fpcompiler.compile(Pair(), "w4a6", example_inputs=X, share_scales=True)
    assert plain.artifact.tensors.keys() == shared.artifact.tensors.keys()
    for key, tensor in plain.artifact.tensors.items():
        assert torch.equal(tensor, shared.artifact.tensors[key])


def test_static_inputs_have_the_scale_of_the_calibration_data(tmp_path) -> None:
    compiled = fpcompiler.compile(
        Pair(), "nvfp4", example_inputs=X, static_inputs=True, calibration=[X, X * 3]
    )
    weights = layer_weights(compiled.artifact)
    expected = power_of_two(3 * float(X.abs().max()), NVFP4)
    assert float(weights["a"].input_outer) == float(expected)
    assert any("static scale of the input: 2**-" in row.reason for row in compiled.plan().rows)
    compiled.save(tmp_path / "model.fpc")
    loaded = fpcompiler.load(tmp_path / "model.fpc")
    reference = fpcompiler.compile(
        Pair(), "nvfp4", example_inputs=X, static_inputs=True, calibration=[X, X * 3],
        target="reference",
    )  # fmt: skip
    torch.testing.assert_close(loaded(X), reference(X))
    # A call beyond the calibration data saturates; the scale no longer follows the call.
    within = [step for step in compiled.artifact.plan.steps if step.op == "fpc.quantize_within"]
    assert len(within) == 2
    assert int(quantize_within(X * 1e4, expected, NVFP4)[1].max()) == 0x7E
    assert loaded.verify().ok


def test_static_inputs_need_data() -> None:
    with pytest.raises(OptionError, match="static scales of inputs learns from data"):
        fpcompiler.compile(Pair(), "nvfp4", example_inputs=X, static_inputs=True)


def test_scales_that_were_searched_are_not_replaced() -> None:
    with pytest.raises(PassError, match="share_scales gives weights scales of its own"):
        fpcompiler.compile(
            Pair(), "nvfp4", example_inputs=X, share_scales=True, method="search", calibration=[X]
        )
    text = "cse,normalize,insert-quantize{scheme=nvfp4},cse,search-formats,share-scales"
    with pytest.raises(PassError, match="put share-scales before search-formats"):
        fpcompiler.compile(Pair(), "nvfp4", example_inputs=X, pipeline=text, calibration=[X])


ENCODE = """
module attributes {{fpq.stage = "quantized"}} {{
  func.func @main(%x: !torch.vtensor<[4,32],f32>) -> !torch.vtensor<[4,32],f32> {{
    %s = torch.vtensor.literal(dense<1.0> : tensor<1x1xf32>) : !torch.vtensor<[1,1],f32>
    %scale = torch_c.to_builtin_tensor %s : !torch.vtensor<[1,1],f32> -> tensor<1x1xf32>
    %none = torch.constant.none
    %q = "fpq.encode"(%x, %scale, %none)
      : (!torch.vtensor<[4,32],f32>, tensor<1x1xf32>, !torch.none)
      -> !fpq.quantized<tensor<4x32xf4E2M1FN>, "{levels}">
    %y = "fpq.dequantize"(%q) : (!fpq.quantized<tensor<4x32xf4E2M1FN>, "{levels}">)
      -> !torch.vtensor<[4,32],f32>
    return %y : !torch.vtensor<[4,32],f32>
  }}
}}
"""


def test_only_a_scale_of_the_tensor_may_be_given_alone() -> None:
    good = ENCODE.format(levels="tensor:f32/block16:f8E4M3FN")
    assert "fpq.encode" in opt(good, "cse")
    with pytest.raises(IRError, match="scales"):
        opt(ENCODE.format(levels="row:f32/block16:f8E4M3FN"), "cse")
