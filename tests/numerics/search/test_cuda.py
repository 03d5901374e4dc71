"""The same choices on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.numerics.search import (
    paper_formats,
    quantize_with_scale,
    search_block_scales,
    search_layer,
    search_layer_faithful,
)
from fpcompiler.operand import Operand
from tests.models import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FOUR = paper_formats(4)


@pytest.mark.parametrize("search", [search_layer, search_layer_faithful])
@pytest.mark.parametrize("tokens", [60, 700])
def test_layers(search, tokens: int) -> None:
    x, w = normal(tokens, 96), normal(40, 96, seed=1)
    x[:, 7] *= 50
    for fisher in (None, normal(tokens, 40, seed=2).square()):
        own = search(x, w, FOUR, FOUR, fisher=fisher)
        cuda = None if fisher is None else fisher.cuda()
        found = search(x.cuda(), w.cuda(), FOUR, FOUR, fisher=cuda)
        assert (found.weight.spec, found.activation.spec) == (own.weight.spec, own.activation.spec)
        assert found.weight.scale.is_cuda
        # Sums in another order decide between clips whose losses are equal but for last bits.
        assert found.loss == pytest.approx(own.loss, rel=1e-3)
        assert found.rtn_loss == pytest.approx(own.rtn_loss, rel=1e-4)


@pytest.mark.parametrize(
    "text", ["f4E2M1FN@tensor:f32/block16:f8E4M3FN", "f4E2M1FN@row:f32/block32:f8E8M0FNU:floor"]
)
def test_blocks_and_given_scales(text: str) -> None:
    operand, w = Operand.parse(text), normal(64, 200)
    importance = normal(200, seed=1).square()
    codes, scales = search_block_scales(w, operand, importance)
    found, its_scales = search_block_scales(w.cuda(), operand, importance.cuda())
    assert torch.equal(found.cpu(), codes)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(its_scales, scales, strict=True))
    scale = w.abs().amax(1, keepdim=True) / 7
    for spec in FOUR:
        own = quantize_with_scale(w, scale, spec)
        assert torch.equal(quantize_with_scale(w.cuda(), scale.cuda(), spec).cpu(), own)
