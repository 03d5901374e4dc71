"""The reference backend on a GPU: the same program, and the recorded calls replayed there."""

import pytest
import torch
from torch import nn

import fpcompiler
from fpcompiler.numerics import sqnr_db
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.tree import flatten
from tests.models import CachedAttention
from tests.passes.tiny import Attention, tiny
from tests.plans import Mlp, mlp_artifact, with_golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_saved_model_runs_and_verifies_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    artifact = with_golden(mlp_artifact(Mlp()), torch.randn(2, 64))
    CompiledModel(artifact).save(tmp_path / "model.fpc")
    cpu, gpu = load(tmp_path / "model.fpc"), load(tmp_path / "model.fpc", device="cuda")
    x = torch.randn(5, 64)
    spec = artifact.plan.signature.outputs
    results = flatten(spec, cpu(x), "cpu"), flatten(spec, gpu(x.cuda()), "cuda")
    for expected, found in zip(*results, strict=True):
        assert sqnr_db(expected, found.cpu()) > 20  # one flipped rounding costs some decibels
    assert gpu.verify().ok


@pytest.mark.parametrize(
    ("kind", "shape", "parts"),
    [
        (Attention, (2, 12, 32), "qkv={0},weights={0}"),  # its mask is made by the program
        (CachedAttention, (1, 4, 64), "qkv={0},weights={0},cache={0}"),
    ],
)
def test_quantized_attention_and_its_cache_run_on_a_gpu(
    kind: type[nn.Module], shape: tuple[int, ...], parts: str, tmp_path
) -> None:
    pytest.importorskip("torch_mlir")
    inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
    inputs += (torch.arange(shape[1]),) if kind is CachedAttention else ()
    attention = parts.format("f8E4M3FN@token:f32")
    compiled = fpcompiler.compile(tiny(kind), "w4a16", example_inputs=inputs, attention=attention)
    compiled.save(tmp_path / "model.fpc")
    gpu = load(tmp_path / "model.fpc", device="cuda")
    for _ in range(2):
        found = gpu(*(tensor.cuda() for tensor in inputs))
        assert sqnr_db(compiled(*inputs), found.cpu()) > 20
    assert gpu.verify().ok
