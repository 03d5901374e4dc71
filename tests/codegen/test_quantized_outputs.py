"""Which layers get kernels that quantize their output, and the sources of these."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass.emit import emit
from fpcompiler.codegen.cutlass.quantized import (
    QuantizedOutput,
    why_not_on,
    why_not_quantized,
)
from fpcompiler.codegen.cutlass.record import describe, parse_instance
from fpcompiler.codegen.gemms import gemms_of
from fpcompiler.codegen.kernel_plan import plan_kernels
from fpcompiler.codegen.problem import Rows
from fpcompiler.codegen.proof.contract import check_launch
from fpcompiler.codegen.proof.launch import MapType
from fpcompiler.codegen.proof.machine_code import check_machine_code, machine_code_controls
from fpcompiler.codegen.proof.prove import prove
from fpcompiler.codegen.proof.record import Outcome
from fpcompiler.codegen.quantized_outputs import quantized_outputs
from fpcompiler.errors import ArtifactError
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from tests.codegen.problems import MXFP4, W4A6, W4A8, instance_of, problem
from tests.codegen.proof.samples import INSTANCE, launch
from tests.codegen.proof.test_machine_code import opcodes

needs_cutlass = pytest.mark.skipif(
    importlib.util.find_spec("cutlass_library") is None, reason="nvidia-cutlass is not installed"
)
A6 = "f6E2M3FN@block32:f8E8M0FNU"


class Block(nn.Module):
    """An output that only GELU and a quantizer read, one with a residual, one of 100 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.odd, self.last = nn.Linear(64, 100), nn.Linear(100, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        result: Tensor = self.last(nn.functional.relu(self.odd(x)))
        return result


def outputs(scheme: str, arch: str) -> dict[str, dict[Rows, str]]:
    x = torch.randn(3, 64).bfloat16()
    model = Block().eval().bfloat16()
    artifact = fpcompiler.compile(
        model, f"{scheme},skip=none", example_inputs=(x,), target="reference"
    ).artifact
    gemms = gemms_of(artifact.plan, artifact.tensors)
    rows = plan_kernels(gemms, arch).layers
    found = quantized_outputs(artifact.plan, rows, {gemm.layer: gemm.n for gemm in gemms})
    return {name: {r: i.name for r, i in own.items()} for name, own in found.items()}


def test_where_the_graph_allows_it() -> None:
    found = outputs("w4a8", "sm_100a")
    name = "gemm_sm_100a_mxf8f6f4_e4m3_e2m1_bf16_to_e4m3_mse_gelu_{}"
    tiles = {Rows.DECODE: "128x64x128", Rows.PREFILL: "256x128x128c2x1"}
    assert found == {"up": {rows: name.format(tile) for rows, tile in tiles.items()}}
    for scheme, element in (("w4a6", "e2m3"), ("w4a8", "e4m3")):
        name = f"gemm_sm_120a_mxf8f6f4_{element}_e2m1_bf16_to_{element}_mse_gelu_128x128x128"
        assert outputs(scheme, "sm_120a") == {"up": dict.fromkeys(Rows, name)}


@pytest.mark.parametrize(
    ("scheme", "arch"),
    [("w4a6", "sm_90a"), ("w4a6", "sm_100a"), ("w4a6-row", "sm_120a"), ("nvfp4", "sm_100a")],
)
def test_elsewhere_there_are_none(scheme: str, arch: str) -> None:
    assert not outputs(scheme, arch)


@pytest.mark.parametrize(
    ("operand", "producer", "reason"),
    [
        (A6, "", ""),
        (A6, "gelu_tanh", ""),
        ("f6E2M3FN@token:f32/block32:f8E8M0FNU", "", "known only when the whole output is"),
        ("f4E2M1FN@tensor:f32/block16:f8E4M3FN", "", "known only when the whole output is"),
        ("f4E2M1FN@block16:f8E4M3FN", "", "no powers of two"),
        ("f6E1M4FN@block32:f8E8M0FNU", "", "no copy engine stores f6E1M4FN"),
        (A6, "silu_mul", "reads more than the output"),
    ],
)
def test_why_not(operand: str, producer: str, reason: str) -> None:
    found = why_not_quantized(Operand.parse(operand), producer)
    assert reason in found
    assert bool(found) == bool(reason)


def test_codes_of_six_bits_are_not_made_on_data_centre_gpus() -> None:
    quantized = QuantizedOutput(A6)
    assert "lines of 128" in why_not_on(100, quantized)
    assert why_not_on(120, quantized) == ""
    assert why_not_on(100, QuantizedOutput("f4E2M1FN@block32:f8E8M0FNU")) == ""
    values = {**describe(instance_of(problem(W4A6, "sm_100a"))), "quantized": asdict(quantized)}
    with pytest.raises(ArtifactError, match="lines of 128"):
        parse_instance(values)


@needs_cutlass
@pytest.mark.parametrize("arch", ["sm_100a", "sm_120a"])
@pytest.mark.parametrize(
    ("pair", "operand"),
    [(MXFP4, "f4E2M1FN@block32:f8E8M0FNU"), (W4A6, A6), (W4A8, "f8E4M3FN@block32:f8E8M0FNU")],
    ids=["e2m1", "e2m3", "e4m3"],
)
def test_the_source(pair, operand: str, arch: str) -> None:
    plain = instance_of(problem(pair, arch))
    texts = {}
    for producer in ("", "gelu", "silu"):
        instance = replace(plain, quantized=QuantizedOutput(operand, producer))
        texts[producer] = text = emit(instance).text
        assert "$" not in text
        assert f"struct {instance.name} :" in text
        assert f"QuantizedRow{arch[3:6]}<Problem0" in text
        assert "args.d_scales" in text
        assert "return fpc_gemm_quantized_bits" not in text
        assert f"fpc_gemm_quantized_bits() {{ return {instance.quantized.bits}; }}" in text
    assert len({*texts.values(), emit(plain).text}) == 4
    assert "quantized" not in emit(plain).text.lower()


CODES = {
    "f4E2M1FN": MapType.U4_PACKED, "f6E2M3FN": MapType.U6_UNPACKED, "f8E4M3FN": MapType.UINT8,
}  # fmt: skip


@pytest.mark.parametrize("element", CODES)
def test_the_map_of_the_output_is_that_of_codes(element: str) -> None:
    record = launch()
    quantized = QuantizedOutput(f"{element}@block32:f8E8M0FNU")
    instance = replace(INSTANCE, quantized=quantized)
    n, m = record.shape.n, record.shape.m
    maps = {one.tensor: one for one in record.maps}
    strides = (n * quantized.bits // 8, *maps["d"].strides[1:])
    own = replace(maps["d"], type=CODES[element], strides=strides)
    assert own.sizes[:2] == (n, m)

    def findings(d) -> str:
        others = [one for one in record.maps if one.tensor != "d"]
        return " ".join(check_launch(replace(record, maps=(*others, d)), instance))

    # The sample's sizes are no whole rows of codes, which the driver's rules say.
    assert "is not the expected" not in findings(own)
    assert "d: " in findings(maps["d"])
    assert "is not the expected" in findings(replace(own, strides=maps["d"].strides))
    for other in CODES.values():
        if other is not own.type:
            assert "is not the expected" in findings(replace(own, type=other))


MOVES = ("UTMALDG.3D", "UTMASTG.3D", "UTMALDG.4D", "LDSM.U4x16P64TO8.M816.4",
         "LDSM.U6x16P32TO8.M816.4")  # fmt: skip


@pytest.mark.parametrize("name", ["E2M1", "E2M3", "E4M3"])
def test_codes_are_made_by_the_conversion_to_their_format(name: str) -> None:
    element = {"E2M1": "f4E2M1FN", "E2M3": "f6E2M3FN", "E4M3": "f8E4M3FN"}[name]
    plain = instance_of(problem(W4A6, "sm_120a"))
    instance = replace(plain, quantized=QuantizedOutput(f"{element}@block32:f8E8M0FNU"))
    products = ["QMMA.SF.16832.F32.E2M3.E2M1.E8"] * 4
    convert = f"F2FP.SATFINITE.{name}.F32.PACK_AB_MERGE_C"
    code = opcodes(*MOVES, *products, convert)("sm_120a")
    assert check_machine_code(code, instance) == ()
    controls = machine_code_controls(instance)
    assert len([key for key in controls if key.startswith("results")]) == 5
    for key, wrong in controls.items():
        assert check_machine_code(code, wrong), key
    assert check_machine_code(opcodes(*MOVES, *products)("sm_120a"), instance)
    assert check_machine_code(opcodes(*MOVES, *products)("sm_120a"), plain) == ()


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "pair", "operand"),
    [("sm_100a", MXFP4, "f4E2M1FN@block32:f8E8M0FNU"), ("sm_120a", W4A6, A6)],
)
def test_kernels_pass_their_proof(arch: str, pair: tuple[str, str], operand: str) -> None:
    instance = replace(instance_of(problem(pair, arch)), quantized=QuantizedOutput(operand, "gelu"))
    options = Options.from_env()
    record = prove(KernelCache.from_options(options).build(emit(instance)), ("L2", "L3"), options)
    assert record.passed
    done = [check for check in record.checks if check.outcome is Outcome.PASSED]
    assert {"launch 300x640x640", "instructions", "registers"} <= {check.name for check in done}
