"""Squared gradients: against those of the model itself, and the search that they weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import ir
from fpcompiler.calibration import Calibration, input_groups
from fpcompiler.errors import RunError
from tests.calibration.runs import CPU, keep, silent, visit
from tests.models import normal
from tests.passes.tiny import Attention, Mlp, tiny
from tests.programs import quantized, run_passes

BATCHES = [(normal(6, 32, seed=seed),) for seed in range(3)]


def gradients(
    program: ir.Program, calibration: Calibration, layers: list[str]
) -> dict[str, Tensor]:
    with (
        program.context(),
        calibration.squared_gradients(program, label="test", progress=silent) as found,
    ):
        return {layer: found.of(layer) for layer in layers}


def jacobian_squares(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return the sum over outputs of squared derivatives by the output of a layer, ``[T, N]``."""
    module, outputs = model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda m, a, y: outputs.append(y.requires_grad_()) or y)
    result = model(x)
    handle.remove()
    total = torch.zeros_like(outputs[0])
    for element in result.flatten():
        (gradient,) = torch.autograd.grad(element, outputs[0], retain_graph=True)
        total += gradient.square()
    return total.flatten(0, -2)


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_they_estimate_the_diagonal_of_the_square_of_the_jacobian(
    monkeypatch: pytest.MonkeyPatch, rotated: bool
) -> None:
    monkeypatch.setattr("fpcompiler.calibration.gradients._PROJECTIONS", 400)
    model = tiny(Mlp).requires_grad_(False)
    program = quantized(model, BATCHES[0][0], scheme="w4a6,skip=none")
    if rotated:
        run_passes(program, "rotate{block=16 weights_too=true}")
    layers = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    found = gradients(program, Calibration(BATCHES, sample=18, device=CPU), layers)
    for layer in layers:
        wanted = torch.cat([jacobian_squares(model, layer, x) for (x,) in BATCHES])
        assert found[layer].shape == wanted.shape
        # 400 draws: a relative deviation of sqrt(2 / 400) each.
        assert float((found[layer] - wanted).norm() / wanted.norm()) < 0.12


def test_they_belong_to_the_tokens_of_the_sample() -> None:
    model = tiny(Mlp)
    program = quantized(model, BATCHES[0][0], scheme="w4a6,skip=none")
    some, every = (Calibration(BATCHES, sample=s, device=CPU) for s in (7, 18))
    name = next(iter(visit(program, some)))
    samples = [visit(program, calibration, keep)[name]["sample"] for calibration in (some, every)]
    rows = [gradients(program, calibration, [name])[name] for calibration in (some, every)]
    assert len(rows[0]) == 7
    for token, row in zip(samples[0], rows[0], strict=True):
        place = int((samples[1] == token).all(1).nonzero())
        assert torch.equal(rows[1][place], row)


def test_a_run_goes_on_after_its_last_batch(tmp_path: Path) -> None:
    program = quantized(tiny(Mlp), BATCHES[0][0], scheme="w4a6,skip=none")
    name = input_groups_of(program)[0]
    whole = gradients(program, Calibration(BATCHES, device=CPU), [name])[name]
    kept = Calibration(BATCHES, device=CPU, folder=tmp_path)
    assert torch.equal(gradients(program, kept, [name])[name], whole)
    files = sorted(tmp_path.rglob("gradients-*.safetensors"))
    assert len(files) == 3
    files[1].unlink()
    times = [file.stat().st_mtime_ns for file in (files[0], files[2])]
    assert torch.equal(gradients(program, kept, [name])[name], whole)
    assert times == [file.stat().st_mtime_ns for file in (files[0], files[2])]


def input_groups_of(program: ir.Program) -> list[str]:
    with program.context():
        return [group.name for group in input_groups(program)]


class Sign(nn.Module):
    """A model without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).argmax(-1)


def test_a_layer_that_changes_no_output_has_zeros() -> None:
    program = quantized(Sign(), BATCHES[0][0], scheme="w4a6,skip=none")
    found = gradients(program, Calibration(BATCHES, device=CPU), ["first"])
    assert not found["first"].any()


def test_a_batch_that_does_not_fit_is_named() -> None:
    program = quantized(tiny(Mlp), BATCHES[0][0], scheme="w4a6,skip=none")
    calibration = Calibration([*BATCHES, (normal(6, 31),)], device=CPU)
    with pytest.raises(RunError, match="calibration batch 3: the model cannot run on it"):
        gradients(program, calibration, [])


@pytest.mark.parametrize("scheme", ["w4a6", "w=e2m1@row:f32,a=e2m1@tensor:f32", "w4a16"])
def test_the_objective_follows_the_outputs_that_matter(scheme: str) -> None:
    """Half of the first layer's outputs change nothing, so their errors must not count."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) ** 3)

    torch.manual_seed(3)
    model = Half().requires_grad_(False)
    model.second.weight[:, :16] = 0
    data = [normal(64, 32, seed=seed) ** 3 for seed in range(4)]
    wanted, errors = [model(x) for x in data], {}
    for objective in ("mse", "fisher"):
        method = "search" if objective == "mse" else "search-fisher"
        compiled = fpcompiler.compile(model, scheme, calibration=data, method=method)
        errors[objective] = sum(
            float((compiled(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True)
        )
    assert errors["fisher"] <= errors["mse"] * 1.02


def test_attention_has_derivatives() -> None:
    program = program_for_attention()
    names = input_groups_of(program)
    x = [(normal(2, 9, 32),)]
    found = gradients(program, Calibration(x, device=CPU), names)
    assert all(bool(found[name].any()) for name in names)


def program_for_attention() -> ir.Program:
    return quantized(tiny(Attention), normal(2, 9, 32), scheme="w4a6,skip=none")
