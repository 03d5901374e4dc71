"""The reference backend on a GPU: the same program, and the recorded calls replayed there."""

import pytest
import torch

from fpcompiler.numerics import sqnr_db
from fpcompiler.runtime.model import CompiledModel, load
from fpcompiler.tree import flatten
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
