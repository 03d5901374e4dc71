"""Estimates for GPUs that nothing was measured on."""

from __future__ import annotations

import pytest

from fpcompiler.operand import Operand
from fpcompiler.runtime.costs import GPUS, MEASURED, LayerCall, Prediction, predict, source_of
from fpcompiler.runtime.costs.datasheet import DATASHEETS
from fpcompiler.target import TARGETS, Status
from tests.runtime.costs.test_hopper import layer

ESTIMATED = sorted(DATASHEETS)


def test_what_was_measured_is_what_was_run() -> None:
    assert {*GPUS} <= {*TARGETS}
    ran = {name for name in GPUS if TARGETS[name].status is Status.EXECUTED}
    assert ran == {*MEASURED}


@pytest.mark.parametrize("gpu", ESTIMATED)
def test_each_way_to_multiply_has_a_rate(gpu: str) -> None:
    assert {kind.name for kind in TARGETS[gpu].kinds} == {*DATASHEETS[gpu].rates}


@pytest.mark.parametrize("gpu", ESTIMATED)
def test_many_tokens_are_bound_by_the_rate_and_few_by_memory(gpu: str) -> None:
    sheet = DATASHEETS[gpu]
    many = predict(gpu, layer("nvfp4", 1 << 20))
    few = predict(gpu, layer("nvfp4", 1))
    assert isinstance(many, Prediction)
    assert isinstance(few, Prediction)
    operations = 2 * 4096 * 4096 * 2**20
    assert many.bf16_microseconds == pytest.approx(operations / sheet.rates["bf16"])
    assert many.microseconds > operations / sheet.rates["nvf4"]
    assert few.bf16_microseconds == pytest.approx(2 * 4096**2 / sheet.bandwidth, rel=0.01)
    assert few.speed == pytest.approx(16 / 4.5, rel=0.01)


def test_an_input_of_several_layers_is_quantized_once() -> None:
    alone, shared = (
        predict("sm_100a", layer("nvfp4", 1, together=sizes)) for sizes in ((), (4096, 4096))
    )
    assert isinstance(alone, Prediction)
    assert isinstance(shared, Prediction)
    codes, inputs = 4096 * 4.5 / 8, 4096 * 2
    saved = (2 * codes + inputs) / 2 / DATASHEETS["sm_100a"].bandwidth
    assert alone.microseconds - shared.microseconds == pytest.approx(saved, rel=1e-3)


def test_layers_without_kernels_get_a_reason() -> None:
    assert predict("sm_100a", layer("w4a16", 1)) == (
        "there are no kernels for w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=none on sm_100a"
    )
    odd = LayerCall(1, 64, 128, Operand.parse("e3m4@row:f32"), Operand.parse("e2m3@token:f32"))
    assert isinstance(predict("sm_120a", odd), str)


def test_an_estimate_is_called_one() -> None:
    for gpu in ESTIMATED:
        assert source_of(gpu).startswith("estimated from the data sheet of an NVIDIA ")
        assert source_of(gpu).endswith(", never measured")
