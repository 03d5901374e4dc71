"""The user's model is the same after a capture, whether it worked or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpcompiler.capture import capture
from fpcompiler.errors import CaptureError
from tests.models import CachedAttention, Llama, normal, token_ids


class Stateful(nn.Module):
    """Counts, remembers and registers while it runs."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.log, self.sizes = 0, [], {}
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append("called")
        self.sizes[self.calls] = tuple(x.shape)
        self.steps.add_(1)
        self.register_buffer("table", torch.ones(4))
        self.extra = "made in forward"
        if self.fails and x.sum() > 0:
            return x
        return self.dropout(self.linear(x)) + self.table


def picture(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that capture could change."""
    return {
        name: (set(module.__dict__), module.training, module.__dict__.get("calls"))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(fails: bool, training: bool) -> None:
    model = Stateful(fails).train(training)
    before, tensors = picture(model), copy.deepcopy(model.state_dict())
    if fails:
        with pytest.raises(CaptureError, match="control flow"):
            capture(model, (normal(2, 4),))
    else:
        capture(model, (normal(2, 4),))
    assert picture(model) == before
    assert (model.log, model.sizes, model.calls) == ([], {}, 0)
    assert list(model.state_dict()) == list(tensors)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())


def test_flags_of_submodules_stay_mixed() -> None:
    model = Llama(layers=2).train()
    model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    capture(model, (token_ids(2, 5),))
    assert [module.training for module in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_training_mode_is_noted_only_if_it_matters() -> None:
    x = normal(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    program = capture(model, (x,))
    assert program.notes == (
        "the model was in training mode (BatchNorm1d, Dropout); it is captured in eval mode",
    )
    assert model.training
    assert torch.equal(program.exported.module()(x), model.eval()(x))
    assert capture(nn.Linear(8, 8).train(), (x,)).notes == ()


def test_a_model_that_overrides_train_keeps_its_weights() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            if hasattr(self, "weight") and not mode:
                self.weight.data.add_(1)
            return super().train(mode)

    model = Merging(4, 4)
    before = model.weight.detach().clone()
    capture(model, (normal(2, 4),))
    assert torch.equal(model.weight, before)


def test_caches_are_empty_after_a_capture() -> None:
    model = CachedAttention().eval()
    capture(model, (normal(1, 3, 64), torch.arange(3)))
    assert not model.k_cache.any()
    assert not model.v_cache.any()


def test_hooks_and_inputs_stay() -> None:
    model, seen = nn.Linear(4, 4), []
    model.register_forward_hook(lambda *_: seen.append(1))
    x = normal(1, 4)
    before = x.clone()
    program = capture(model, (x,))
    assert len(model._forward_hooks) == 1
    assert torch.equal(x, before)
    assert torch.equal(program.exported.module()(x), model(x))


def test_a_capture_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        capture(Stateful(fails=True), (normal(2, 4),))
    capture(CachedAttention().eval(), (normal(1, 3, 64), torch.arange(3)))
    assert capfd.readouterr() == ("", "")


class Frozen(dict):
    """A dict that cannot be written to, such as the config of a model of diffusers."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("frozen")

    def clear(self) -> None:
        raise TypeError("frozen")


def test_a_frozen_dict_of_the_model_is_left_alone() -> None:
    model = nn.Linear(4, 4).eval()
    model.config = Frozen(width=4, bias=torch.zeros(2))
    capture(model, (normal(2, 4),))
    assert set(model.config) == {"width", "bias"}
