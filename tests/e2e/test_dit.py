"""The trained diffusion transformer: it draws what it is asked for, also in few bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fpcompiler

pytest.importorskip("torch_mlir")

from examples.dit import weights
from examples.dit.classifier import frechet_distance
from examples.dit.diffusion import add_noise, sample, sampling_timesteps, signal, trajectory

CLASSES = torch.arange(10)


def call(batch: int) -> tuple[torch.Tensor, ...]:
    noise = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
    return noise, torch.arange(batch) * 100, torch.arange(batch)


def test_the_compiled_model_draws_the_class_that_is_asked_for() -> None:
    compiled = fpcompiler.compile(weights.dit(), "w4a8", example_inputs=call(4))
    assert all(row.quantized for row in compiled.plan().rows if ".fc" in row.name)
    with torch.no_grad():
        pictures = sample(compiled, CLASSES, steps=6)
        found = weights.classifier()(pictures).argmax(1)
    assert int((found == CLASSES).sum()) >= 8


def test_fp4dit_finds_the_layers_of_the_model(tmp_path: Path) -> None:
    model, inputs = weights.dit(), call(2)
    compiled = fpcompiler.compile(model, "fp4dit", example_inputs=inputs)
    for row in compiled.plan().rows:
        if row.name.startswith("blocks.") and "modulation" not in row.name:
            wanted = "f4E3M0FN" if row.name.endswith("fc1") else "f4E2M1FN"
            assert (row.weight, row.activation) == (f"{wanted}@block128:f32", "f6E2M3FN@token:f32")
        else:
            assert not row.quantized
            assert row.role in ("modulation", "embedding", "head")
    result = compiled(*inputs)
    with torch.no_grad():
        expected = model(*inputs)
    assert float((result - expected).norm() / expected.norm()) < 0.3
    compiled.save(tmp_path / "dit.fpc")
    loaded = fpcompiler.load(tmp_path / "dit.fpc")
    assert torch.equal(loaded(*inputs), result)
    assert loaded.plan().to_json() == compiled.plan().to_json()
    assert loaded.scheme == compiled.scheme


def test_the_schedule_goes_from_the_picture_to_noise() -> None:
    t = torch.arange(1000)
    kept = signal(t)
    assert float(kept[0]) > 0.999
    assert float(kept[-1]) < 1e-4
    assert bool((kept.diff() <= 0).all())
    picture, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert float(add_noise(picture, noise, t[-1:]).max()) < 0.01


def test_a_sampler_with_the_true_noise_finds_the_picture() -> None:
    picture = torch.rand(1, 1, 28, 28) * 2 - 1

    def predict(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kept = signal(t)[:, None, None, None]
        return (x - kept.sqrt() * picture) / (1 - kept).sqrt()

    found = sample(predict, torch.zeros(1, dtype=torch.int64), steps=4, guidance=3.0)
    torch.testing.assert_close(found, picture, atol=1e-4, rtol=1e-4)


def test_a_trajectory_shows_the_calls_of_the_sampler() -> None:
    model, labels = weights.dit(), torch.tensor([3])
    noise = call(1)[0]
    calls = [c for c, _ in trajectory(model, noise, labels, steps=3, guidance=2.0, none=10)]
    assert [int(t[0]) for _, t, _ in calls] == sampling_timesteps(3) == [999, 666, 333]
    assert calls[0][2].tolist() == [3, 10]
    assert torch.equal(calls[0][0], torch.cat([noise, noise]))


def test_the_frechet_distance_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20000, 4, generator=generator) for _ in range(2))
    assert frechet_distance(a, b) < 0.01
    moved = b * 2 + torch.tensor([3.0, 0, 0, 0])
    assert frechet_distance(a, moved) == pytest.approx(9 + 4, rel=0.03)
