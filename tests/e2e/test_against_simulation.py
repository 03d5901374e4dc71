"""The compiler against an independent simulation in eager torch, on real models."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import numerics
from fpcompiler.errors import DependencyError
from fpcompiler.operand import Operand
from fpcompiler.scheme import Scheme

pytest.importorskip("transformers")
pytest.importorskip("onnx")

from examples.zoo import corpora, dinov2, metrics, minilm, smollm2, whisper
from tests.e2e.rtn_simulation import GRIDS, Quantizer, quantize_model

T = TypeVar("T")

OPERANDS = (
    "f4E2M1FN@row:f32",
    "f4E2M1FN@block32:f32",
    "f4E2M1FN@tensor:f32",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU:floor",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU:ceil",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU:rne",
    "f6E2M3FN@token:f32",
    "f6E2M3FN@block32:f8E8M0FNU",
    "f6E2M3FN@block32:f8E8M0FNU:rne",
    "f6E3M2FN@block32:f8E8M0FNU",
    "f8E4M3FN@token:f32",
    "f8E4M3FN@block32:f8E8M0FNU:floor",
)


def available(load: Callable[[], T]) -> T:
    """Return what ``load`` returns; skip the test, with the reason, if its package is missing."""
    try:
        return load()
    except DependencyError as error:
        pytest.skip(str(error))


def simulated(model: nn.Module, scheme: str, compiled: fpcompiler.CompiledModel) -> nn.Module:
    """Return the simulation of a model, with the layers kept that the compiler kept."""
    base = Scheme.parse(scheme).base
    kept = tuple(row.name for row in compiled.plan().rows if not row.quantized)
    return quantize_model(model, str(base.weight), str(base.activation or ""), skip=kept)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_of_the_simulation(name: str) -> None:
    types = pytest.importorskip("ml_dtypes")
    dtype = {
        "f4E2M1FN": types.float4_e2m1fn,
        "f6E2M3FN": types.float6_e2m3fn,
        "f6E3M2FN": types.float6_e3m2fn,
        "f8E4M3FN": types.float8_e4m3fn,
    }[name]
    grid = GRIDS[name]
    x = torch.linspace(-grid.max, grid.max, 40_001)
    wanted = torch.from_numpy(x.numpy().astype(dtype).astype("float32"))
    assert torch.equal(grid.round(x), wanted)


@pytest.mark.parametrize("text", OPERANDS)
def test_quantized_values_are_the_same_bits(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows of many magnitudes, an outlier channel as in real models, and zeros.
    x = torch.randn(200, 200, generator=generator)
    x *= torch.exp(2 * torch.randn(200, 1, generator=generator))
    x[:, 3] *= 1000
    x[5] = 0
    x[7, 64:96] = 0
    operand = Operand.parse(text)
    ours = numerics.dequantize(*numerics.quantize(x, operand), operand)
    assert torch.equal(ours, Quantizer.parse(text)(x))


@pytest.mark.parametrize(
    ("scheme", "sqnr_db"),
    # Weights alone: the same numbers, summed in another order. Rounded activations turn a last bit
    # into a step of the format wherever a value lies on the edge, layer after layer.
    [("w4a16", 100), ("w4a6-row", 15), ("nvfp4", 10)],
)
def test_minilm(scheme: str, sqnr_db: float) -> None:
    model, (texts, _) = available(minilm.load), available(corpora.lee)
    compiled = fpcompiler.compile(model, scheme, example_inputs=minilm.example_inputs())
    table = compiled.compare(simulated(model, scheme, compiled), [minilm.batch(texts[:8])])
    found = {row.name: row.sqnr_db for row in table.rows if row.sqnr_db is not None}
    for name in ("query", "key", "value"):
        assert found[f"encoder.layer.0.attention.self.{name}"] > 120
    assert found["last_hidden_state"] > sqnr_db


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    # Rounding activations spreads: a change of 1e-6 moves w4a6 by 0.3 percent and w4a4 by 2 (one
    # standard deviation). The difference of two such numbers is bounded by three times as much.
    [("w4a16", 0.002), ("w4a6", 0.03), ("w4a6-row", 0.03), ("w4a4", 0.09)],
)
def test_smollm2_perplexity(scheme: str, tolerance: float) -> None:
    model = available(smollm2.load)
    ids = smollm2.tokens(1536)
    compiled = fpcompiler.compile(model, scheme, example_inputs=smollm2.example_inputs())
    simulation = simulated(model, scheme, compiled)

    def eager(window: Tensor) -> Tensor:
        return simulation(window, use_cache=False).logits

    wanted = metrics.perplexity(eager, ids)
    assert metrics.perplexity(lambda w: compiled(w).logits, ids) == pytest.approx(
        wanted, rel=tolerance
    )


@pytest.mark.slow
def test_dinov2_features() -> None:
    model, pixels = available(dinov2.load), available(corpora.photographs)[:4]
    compiled = fpcompiler.compile(model, "w4a6-row", example_inputs=dinov2.example_inputs())
    with torch.no_grad():
        tokens, saliency = model(pixels)
        rounded = simulated(model, "w4a6-row", compiled)(pixels)
    ours = compiled(pixels)
    assert metrics.mean_cosine(rounded[0], ours[0]) > 0.99
    cosines = [metrics.mean_cosine(tokens, value[0]) for value in (rounded, ours)]
    assert cosines[1] == pytest.approx(cosines[0], abs=0.005)
    errors = [metrics.mean_absolute_error(saliency, value[1]) for value in (rounded, ours)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.slow
def test_whisper() -> None:
    encoder, decoder = whisper.split(available(whisper.load))
    sound = whisper.example_inputs()
    compiled = fpcompiler.compile(encoder, "w4a16", example_inputs=sound)
    with torch.no_grad():
        states = simulated(encoder, "w4a16", compiled)(*sound)
    assert numerics.metrics.sqnr_db(states, compiled(*sound)) > 70
    inputs = whisper.decoder_example_inputs(states)
    compiled = fpcompiler.compile(decoder, "w4a16", example_inputs=inputs)
    with torch.no_grad():
        wanted = simulated(decoder, "w4a16", compiled)(*inputs)
    assert numerics.metrics.sqnr_db(wanted, compiled(*inputs)) > 70


@pytest.mark.slow
def test_spread_of_a_dynamic_scheme_is_small() -> None:
    """What the tolerances above stand on: 1e-6 of noise moves w4a6 by less than 1 percent."""
    model = available(smollm2.load)
    ids = smollm2.tokens(512)
    base = Scheme.parse("w4a6").base
    simulation = quantize_model(model, str(base.weight), str(base.activation), skip=("lm_head",))
    table = simulation.model.embed_tokens.weight
    original = table.detach().clone()
    found = []
    for seed in range(3):
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            table.copy_(original * (1 + 1e-6 * noise))
        found.append(metrics.perplexity(lambda w: simulation(w, use_cache=False).logits, ids))
    assert statistics.stdev(found) < 0.01 * statistics.mean(found)
