"""The model of times on Hopper: what it says of sizes, and that it speaks of kernels there are."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fpcompiler.codegen.hopper import packed_gemm
from fpcompiler.codegen.problem import OutputType
from fpcompiler.operand import Operand
from fpcompiler.runtime.costs import SLOWER, LayerCall, Prediction, predict, source_of
from fpcompiler.runtime.costs.hopper import Plain, Tile, hopper_costs, kind_of
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.scheme.presets import find_preset

RECORD = Path(__file__).parents[3] / "examples/benchmarks/results/hopper_layers.json"
WEIGHTS = [
    f"{name}{levels}"
    for name in ("e2m1", "e1m2", "e3m0", "e2m3", "e4m3")
    for levels in ("@row:f32", "@row:f32/block32:e8m0", "@tensor:f32/block16:e4m3", "@tensor:f32",
                   "@block128:f32", "@block64:e8m0", "@row:f32/block16:e8m0", "")
]  # fmt: skip
ACTIVATIONS = [
    f"{name}{levels}"
    for name in ("e2m1", "e2m3", "e4m3", "e5m2", "e1m6")
    for levels in ("@token:f32", "@token:f32/block32:e8m0", "@tensor:f32/block16:e4m3",
                   "@tensor:f32", "@block64:e8m0", "")
]  # fmt: skip
ARITHMETIC = {Mode.INTEGERS: "int8", Mode.E4M3: "fp8", Mode.BF16: "bf16"}


def layer(
    scheme: str, m: int, n: int = 4096, k: int = 4096, together: tuple[int, ...] = ()
) -> LayerCall:
    preset = find_preset(scheme)
    activation = None if preset.activation == "none" else Operand.parse(preset.activation)
    return LayerCall(m, n, k, Operand.parse(preset.weight), activation, together)


def predicted(
    scheme: str, m: int, n: int = 4096, k: int = 4096, together: tuple[int, ...] = ()
) -> Prediction:
    found = predict("sm_90a", layer(scheme, m, n, k, together))
    assert isinstance(found, Prediction)
    return found


def test_there_are_predictions_for_the_layers_that_kernels_of_packed_weights_compute() -> None:
    for w, x in itertools.product(WEIGHTS, [None, *ACTIVATIONS]):
        weight, activation = Operand.parse(w), None if x is None else Operand.parse(x)
        gemm = packed_gemm(weight, activation, "sm_90a", OutputType.BF16)
        kind = kind_of(weight, activation)
        assert (gemm is None) == (kind is None), (w, x)
        if gemm is not None and kind is not None:
            assert kind.partition(",")[0] == ARITHMETIC[gemm.mode]
            assert isinstance(
                predict("sm_90a", LayerCall(1, 64, 128, weight, activation)), Prediction
            )


def test_others_get_a_reason() -> None:
    found = predict("sm_90a", layer("mxfp8", 16))
    assert isinstance(found, str)
    assert found.startswith("no times of w=f8E4M3FN@block32:f8E8M0FNU:floor,a=")


def test_large_layers_gain_and_small_ones_do_not() -> None:
    """What was measured, and by how much at least."""
    assert predicted("w4a6-row", 1).speed > 1.5
    assert predicted("w4a6-row", 4096, 14336).speed > 1.4
    assert predicted("w4a16", 1, 14336).speed > 2
    for m in (16, 2048):
        assert predicted("w4a6", m, 1152, 1152).is_slower
    assert predicted("w4a6", 2048).is_slower
    assert not predicted("w4a6", 1).is_slower


@pytest.mark.parametrize("scheme", ["w4a6-row", "w4a8-row", "w4a6", "nvfp4", "w4a16"])
def test_predictions_are_near_what_was_measured(scheme: str) -> None:
    record = json.loads(RECORD.read_text())
    worst = hopper_costs().record["errors"]["worst"]
    for row in record["rows"]:
        found = predicted(scheme, row["m"], row["n"], row["k"])
        assert found.microseconds == pytest.approx(1e6 * row["seconds"][scheme], rel=worst + 0.01)
        plain = 1e6 * row["seconds"]["bf16"]
        assert found.bf16_microseconds == pytest.approx(plain, rel=worst + 0.01)


def test_layers_that_read_one_input_are_one_product() -> None:
    sizes = (4096, 1024, 1024)
    for m in (1, 512):
        whole = predicted("w4a6-row", m, n=6144)
        parts = [predicted("w4a6-row", m, n=n, together=sizes) for n in sizes]
        assert sum(part.microseconds for part in parts) == pytest.approx(whole.microseconds)
        assert len({round(part.speed, 6) for part in parts}) == 1
        assert [part.bf16_microseconds for part in parts] == [
            predicted("w4a6-row", m, n=n).bf16_microseconds for n in sizes
        ]
        # Without quantizing there is nothing that they share.
        assert predicted("w4a16", m, together=sizes) == predicted("w4a16", m)
    assert isinstance(predict("sm_90a", layer("mxfp8", 1, together=sizes)), str)


def test_tiles_come_in_waves() -> None:
    tile = Tile(tokens=64, split=1, groups=2, fixed=1000, each=100, per_sm=1)
    times = [tile.microseconds(m, 128 * 4, 1280, 4) for m in (1, 64, 65, 128)]
    assert times == [2.0, 2.0, 4.0, 4.0]
    assert tile.microseconds(64, 128 * 4 + 1, 1280, 4) == 4.0
    assert replace(tile, per_sm=2).microseconds(128, 128 * 4, 1280, 4) == 2.0
    halves = replace(tile, split=2)
    assert halves.microseconds(64, 128 * 2, 1280, 4) == 1.5
    assert halves.microseconds(64, 128, 128, 4) == float("inf")


def test_bf16_takes_the_longer_of_reading_and_computing() -> None:
    plain = Plain(fixed=5.0, bandwidth=4e6, rate=8e8, sharpness=4.0)
    assert plain.microseconds(1, 4096, 4096) == pytest.approx(5 + 2 * 4096**2 / 4e6, rel=0.01)
    assert plain.microseconds(8192, 8192, 8192) == pytest.approx(5 + 2 * 8192**3 / 8e8, rel=0.01)


def test_a_layer_is_slower_below_a_limit() -> None:
    assert not Prediction(10.0, 10.0 * SLOWER).is_slower
    assert Prediction(10.0, 9.4).is_slower


def test_where_the_numbers_come_from_is_said() -> None:
    text = source_of("sm_90a")
    assert text.startswith("predicted from times of layers with 1024 to 14336 inputs and outputs")
    assert " on an NVIDIA H200 of 20" in text
    assert "error of these: median " in text
