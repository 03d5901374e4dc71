"""The calls that a model gets while other code runs, as calibration data."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, UserDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fpcompiler
from examples.dit import weights
from examples.dit.diffusion import sample, sampling_timesteps, trajectory
from fpcompiler.errors import OptionError, RunError
from tests.hf_models import hf_model


class Denoiser(nn.Module):
    """A model with a timestep, an option and arguments that it does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, t: Any = 0, *, scale: float = 1.0, **extra: Any) -> Tensor:
        return self.fc(x) * scale


class Pipeline:
    """Code of a user, with the model inside."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = Denoiser()

    def __call__(self, steps: int, runs: int = 1) -> Tensor:
        for _ in range(runs):
            x = torch.ones(2, 32)
            for step in range(steps):
                x -= 0.1 * self.transformer(x, torch.tensor([step, step])).detach()
        return x


def test_the_calls_are_copies_of_what_the_model_got() -> None:
    pipeline = Pipeline()
    expected = pipeline(steps=3)
    with fpcompiler.record(pipeline.transformer) as calls:
        assert calls == []
        result = pipeline(steps=3)
    assert torch.equal(result, expected)
    assert [call[1].tolist() for call in calls] == [[0, 0], [1, 1], [2, 2]]
    # The sampler works in place: all calls would hold its last pictures.
    assert torch.equal(calls[0][0], torch.ones(2, 32))
    step = 0.1 * pipeline.transformer(calls[1][0])
    torch.testing.assert_close(calls[2][0], calls[1][0] - step, rtol=0, atol=0)
    pipeline(steps=1)
    assert len(calls) == 3


def test_what_is_recorded_can_be_learned_from() -> None:
    model, x = Denoiser(), torch.ones(2, 32, requires_grad=True)
    with fpcompiler.record(model) as calls:
        model(x)
        with torch.inference_mode():
            model(torch.ones(2, 32)[:, :])
    for (copy,) in calls:
        assert not copy.requires_grad
        assert not copy.is_inference()
        assert torch.equal(copy, x)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_compile_takes_them(method: str) -> None:
    pytest.importorskip("torch_mlir")
    pipeline = Pipeline()
    with fpcompiler.record(pipeline.transformer, balance="t") as calls:
        pipeline(steps=4)
    compiled = fpcompiler.compile(pipeline.transformer, "w4a6", calibration=calls, method=method)
    y, wanted = compiled(*calls[-1]), pipeline.transformer(*calls[-1]).detach()
    assert float((y - wanted).norm() / wanted.norm()) < 0.2


def test_calls_with_keywords_have_names_for_all_arguments() -> None:
    model, x = Denoiser(), torch.ones(1, 32)
    with fpcompiler.record(model) as calls:
        model(x, torch.tensor(5), scale=2.0)
        model(x=x, t=torch.tensor(6))
        model(x, scale=3.0, mask=None, pair=(x, [x]))
    assert [type(call) for call in calls] == [dict] * 3
    assert [list(call) for call in calls] == [
        ["x", "t", "scale"],
        ["x", "t"],
        ["x", "scale", "mask", "pair"],
    ]
    assert calls[2]["mask"] is None
    assert calls[2]["pair"][1][0] is not x
    for call in calls:
        assert call["x"] is not x
        model(**call)


def test_what_has_no_name_cannot_stand_beside_keywords() -> None:
    class Sum(nn.Module):
        def forward(self, *xs: Tensor, scale: float = 1.0) -> Tensor:
            return sum(xs) * scale

    model, x = Sum(), torch.ones(2)
    with fpcompiler.record(model) as calls:
        model(x, x)
    assert len(calls[0]) == 2
    message = r"record: Sum\.forward takes 'xs' by position only and others by name\. Record a"
    with pytest.raises(OptionError, match=message), fpcompiler.record(model):
        model(x, x, scale=2.0)


def test_a_sample_is_balanced_over_the_timesteps_of_the_sampler() -> None:
    model = weights.dit()
    with fpcompiler.record(model, limit=10, balance="t") as calls:
        for seed in range(3):
            sample(model, torch.tensor([seed, 9]), steps=5, seed=seed)
    found = [int(t.unique()) for _, t, _ in calls]
    assert Counter(found) == dict.fromkeys(sampling_timesteps(5), 2)
    # With and without the class, in the order of the sampler.
    assert all(y.tolist()[1:] == [9, 10, 10] for _, _, y in calls)
    runs = [int(y[0]) for _, _, y in calls]
    order = [(run, -t) for run, t in zip(runs, found, strict=True)]
    assert order == sorted(order)


def test_the_pictures_are_those_of_the_trajectory() -> None:
    model, labels = weights.dit(), torch.tensor([3])
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    path = trajectory(model, noise, labels, steps=3, guidance=2.0, none=10)
    with fpcompiler.record(model, balance="t") as calls:
        expected = [call for call, _ in path]
    for call, wanted in zip(calls, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(call, wanted, strict=True))


def test_a_function_can_balance_over_what_is_asked_for() -> None:
    model, noise = weights.dit(), torch.randn(1, 1, 28, 28)
    with fpcompiler.record(
        model, limit=6, balance=lambda x, t, y: (t, bool((y == 10).all()))
    ) as calls:
        for t in (900, 500, 100):
            for label in (1, 2, 3, 10):
                model(noise, torch.tensor([t]), torch.tensor([label]))
    found = Counter((int(t), int(y) == 10) for _, t, y in calls)
    assert found == {(t, none): 1 for t in (900, 500, 100) for none in (False, True)}


def recorded_steps(keys: list[int], limit: int, seed: int = 0, balance: str | None = "t") -> list:
    """Return key and number of the calls that are kept of a run with these keys."""
    model = nn.Identity()
    model.forward = lambda number, t: number  # type: ignore[method-assign]
    with fpcompiler.record(model, limit=limit, balance=balance, seed=seed) as calls:
        for number, key in enumerate(keys):
            model(number, key)
    return [(key, number) for number, key in calls]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(6, 30), st.integers(0, 9))
def test_no_key_could_have_more_unless_another_has_less(keys, limit, seed) -> None:
    kept = recorded_steps(keys, limit, seed)
    assert kept == recorded_steps(keys, limit, seed)
    assert [number for _, number in kept] == sorted({number for _, number in kept})
    assert all(keys[number] == key for key, number in kept)
    there, taken = Counter(keys), Counter(key for key, _ in kept)
    assert len(kept) <= limit
    for key in there:
        if taken[key] < there[key]:
            # It lost calls only to keys that have no more than one more.
            assert taken[key] >= max(taken.values()) - 1


def test_each_call_has_the_same_chance() -> None:
    runs, keys = 1000, [0] * 8 + [1] * 4 + [0] * 4
    counts = Counter(n for seed in range(runs) for _, n in recorded_steps(keys, 6, seed))
    assert sum(counts.values()) == 6 * runs
    for number, key in enumerate(keys):
        expected = runs * 3 / keys.count(key)
        # Five standard deviations of a binomial count, which is less than its mean's root.
        assert abs(counts[number] - expected) < 5 * expected**0.5
    uniform = Counter(n for s in range(runs) for _, n in recorded_steps(keys, 4, s, balance=None))
    assert all(abs(uniform[n] - runs / 4) < 5 * (runs / 4) ** 0.5 for n in range(16))


def test_memory_is_bounded_while_it_runs() -> None:
    made: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Counted()
    with fpcompiler.record(model, limit=4) as calls:
        for number in range(500):
            made.append(number)
            model(torch.full((1,), float(number)))
        inner = model._forward_pre_hooks
        (recorder,) = inner.values()
        assert sum(len(kept.calls) for kept in recorder.sample._kept.values()) == 4
    assert len(calls) == 4


def test_more_timesteps_than_room_are_said() -> None:
    message = (
        r"^record: 6 of 10 values of 't' are in no call that was kept; for all of them, give "
        r"limit=10 or a multiple of it\.$"
    )
    pipeline = Pipeline()
    with (
        pytest.warns(UserWarning, match=message) as warned,
        fpcompiler.record(pipeline.transformer, limit=4, balance="t") as calls,
    ):
        pipeline(steps=10, runs=2)
    assert warned[0].filename == __file__
    assert len({int(t[0]) for _, t in calls}) == 4


def test_the_seed_decides() -> None:
    keys = [0] * 50
    assert recorded_steps(keys, 5, 1) == recorded_steps(keys, 5, 1) != recorded_steps(keys, 5, 2)


def test_a_model_that_is_not_called_is_said() -> None:
    pipeline = Pipeline()
    message = "record: the Denoiser was not called inside of the with block. Give record"
    with pytest.raises(OptionError, match=message), fpcompiler.record(pipeline.transformer):
        pipeline.transformer.forward(torch.ones(1, 32))


def test_an_error_of_the_user_comes_through_and_the_hook_goes() -> None:
    pipeline = Pipeline()
    with (
        pytest.raises(IndexError),
        fpcompiler.record(pipeline.transformer) as calls,
    ):
        [pipeline(steps=2)][1]
    assert len(calls) == 2
    assert not pipeline.transformer._forward_pre_hooks
    with pytest.raises(IndexError), fpcompiler.record(pipeline.transformer):
        [][1]


def test_two_can_record_at_once() -> None:
    pipeline = Pipeline()
    with fpcompiler.record(pipeline.transformer) as outer:
        pipeline(steps=1)
        with fpcompiler.record(pipeline.transformer.fc) as inner:
            pipeline(steps=2)
    assert (len(outer), len(inner)) == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be a whole number of at least 1, not 0"),
        ({"limit": True}, "limit must be a whole number of at least 1, not True"),
        ({"limit": "4"}, "limit must be a whole number of at least 1, not '4'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"balance": 3}, "balance must be the name of an argument, a function of the arguments, "),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message), fpcompiler.record(nn.Linear(2, 2), **options):
        pytest.fail("it started")


def test_what_is_recorded_must_be_a_module_with_that_argument() -> None:
    with (
        pytest.raises(OptionError, match="model must be the module that will be compiled, not fun"),
        fpcompiler.record(lambda x: x),  # type: ignore[arg-type]
    ):
        pytest.fail("it started")
    message = r"balance: Linear has no argument 'imput'\. Did you mean 'input'\? It takes: input\."
    linear = nn.Linear(2, 2)
    with pytest.raises(OptionError, match=message), fpcompiler.record(linear, balance="imput"):
        pytest.fail("it started")
    message = r"balance: a call does not give 'step'; it gives x, t, scale, mask\."
    model, x = Denoiser(), torch.ones(1, 32)
    with pytest.raises(OptionError, match=message), fpcompiler.record(model, balance="step"):
        model(x, mask=None)
    with fpcompiler.record(model, balance="step", limit=1) as calls:
        model(x, step=3)
        model(x, step=torch.tensor(3))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1, 2]), "'t' has several values in one call, so the call cannot be"),
        (torch.empty(0), "'t' has no value in one call, so the call cannot be counted"),
        ([1], "'t' gives a list, which cannot be counted"),
    ],
)
def test_a_key_must_be_one_value(value: object, message: str) -> None:
    model = Denoiser()
    with pytest.raises(OptionError, match=message), fpcompiler.record(model, balance="t"):
        model(torch.ones(1, 32), value)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Counter, "argument 't' is a type; only tensors, None, numbers, texts, and tuples, lists"),
        (UserDict(a=torch.ones(1)), "argument 't' holds a UserDict, which cannot be copied"),
    ],
)
def test_an_argument_that_no_compiled_model_takes(value: object, message: str) -> None:
    model = Denoiser()
    with (
        pytest.raises(RunError, match=message) as caught,
        fpcompiler.record(model) as calls,
    ):
        model(torch.ones(1, 32), t=value)
    assert "in a call of Denoiser that record() was to keep" in caught.value.__notes__[0]
    assert calls == []


def test_a_language_model_that_generates() -> None:
    pytest.importorskip("transformers")
    model = hf_model("hf-llama")
    prompt = torch.arange(1, 9)[None]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with fpcompiler.record(model) as calls:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    assert [call["input_ids"].shape[1] for call in calls] == [8, 9, 10]
    with pytest.raises(RunError, match="DynamicCache") as caught, fpcompiler.record(model):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert "use_cache=False" in caught.value.__notes__[0]
    pytest.importorskip("torch_mlir")
    compiled = fpcompiler.compile(model, "w4a6", calibration=calls, method="gptq")
    with torch.no_grad():
        wanted = model(**calls[2]).logits
    logits = compiled(**calls[2]).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 0.5


def test_it_needs_no_compiler() -> None:
    code = (
        "import sys; sys.modules['torch_mlir'] = None; import fpcompiler, torch\n"
        "model = torch.nn.Linear(2, 2)\n"
        "with fpcompiler.record(model) as calls: model(torch.ones(1, 2))\n"
        "assert len(calls) == 1 and 'fpcompiler.ir' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
