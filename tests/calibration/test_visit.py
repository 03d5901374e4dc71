"""What a visit gives for each group of layers, in one piece and in many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpcompiler.calibration import Calibration, Group, InputStatistics, input_groups
from fpcompiler.errors import NumericsError, OptionError
from tests.calibration.runs import CPU, batches_for, equal, hooked, keep, program_for, silent, visit
from tests.models import Case, normal, own_cases
from tests.programs import Function, quantized

CASES = own_cases()
TINY = 1
"""Memory for one group at a time: as many pieces as groups."""


def setting(case: Case, captured, **options):
    """Return a case's model, its calls, its program and a calibration of them."""
    model, args, kwargs = case.make()
    calls = [(args, kwargs), *case.other_inputs()]
    batches = batches_for(captured(case.name), calls)
    return (
        model,
        calls,
        program_for(captured(case.name)),
        Calibration(batches, device=CPU, **options),
    )


@pytest.mark.parametrize("name", ["llama", "vit", "dit"])
def test_statistics_are_those_of_hooks_on_the_model(name: str, captured) -> None:
    model, calls, program, calibration = setting(CASES[name], captured)
    results = visit(program, calibration)
    # A convolution reads the columns of its patches, which no hook sees.
    linear = {key for key in results if not isinstance(model.get_submodule(key), nn.Conv2d)}
    assert len(linear) >= 8
    seen = hooked(model, linear, calls)
    for key in linear:
        rows = torch.cat(seen[key])
        found = results[key]
        assert int(found["tokens"]) == len(rows)
        # The program computes what the model does, up to the order of sums.
        assert torch.allclose(found["amax"], rows.abs().amax(0), rtol=1e-5, atol=1e-6)
        exact = rows.double().T @ rows.double()
        bound = 1e-5 * (rows.double().abs().T @ rows.double().abs()) + 1e-6
        assert bool(((found["gram"] - exact).abs() <= bound).all())


class Plain(nn.Module):
    """Three layers, of which two share the input of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16, bias=False), nn.Linear(32, 16)
        self.c = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))


def plain(**options) -> tuple[list[Tensor], Calibration]:
    batches = [normal(2, 5, 32), normal(1, 40, 32, seed=1), normal(3, 1, 32, seed=2)]
    calibration = Calibration([(batch,) for batch in batches], device=CPU, **options)
    return batches, calibration


def plain_program(scheme: str = "w4a6,skip=none"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return quantized(Plain(), normal(2, 5, 32), scheme=scheme)


def test_an_input_of_the_model_is_seen_to_the_last_bit() -> None:
    batches, calibration = plain()
    found = visit(plain_program(), calibration)["a"]
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    assert int(found["tokens"]) == 53
    assert torch.equal(found["amax"], rows.abs().amax(0))
    assert torch.allclose(found["gram"], rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["sample"], rows)


def test_layers_of_one_input_are_a_group() -> None:
    program = plain_program()
    with program.context():
        groups = input_groups(program)
    assert [group.names for group in groups] == [("a", "b"), ("c",)]
    assert [group.k for group in groups] == [32, 16]


def test_two_formats_of_one_input_see_the_same() -> None:
    scheme = "w4a6,skip=none; b: w4a8"
    program = plain_program(scheme)
    with program.context():
        groups = input_groups(program)
        assert [group.names for group in groups] == [("a",), ("b",), ("c",)]
        assert groups[0].x == groups[1].x
    for memory in (TINY, 1 << 30):
        found = visit(program, plain(max_memory=memory)[1])
        assert all(torch.equal(found["a"][key], found["b"][key]) for key in found["a"])


@pytest.mark.parametrize("sample", [1, 2, 3, 10, 45])
def test_the_sample_is_rows_without_replacement(sample: int) -> None:
    batches, calibration = plain(sample=sample)
    found = visit(plain_program(), calibration)["a"]["sample"]
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    matches = (found[:, None] == rows).all(-1)
    assert matches.sum(1).tolist() == [1] * len(found)
    assert len(matches.nonzero()[:, 1].unique()) == len(found)
    quotas = [sample * (i + 1) // 3 - sample * i // 3 for i in range(3)]
    assert len(found) == sum(map(min, quotas, (10, 40, 3)))


def test_the_seed_decides_the_sample() -> None:
    samples = [
        visit(plain_program(), plain(sample=6, seed=seed)[1])["a"]["sample"] for seed in (0, 0, 7)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_more_batches_than_tokens_keep_the_sample_small() -> None:
    batches = [(normal(1, 2, 32, seed=i),) for i in range(9)]
    found = visit(plain_program(), Calibration(batches, device=CPU, sample=4))["a"]
    assert len(found["sample"]) == 4
    assert int(found["tokens"]) == 18


@pytest.mark.parametrize("name", own_cases())
def test_many_pieces_give_what_one_gives(name: str, captured) -> None:
    _, _, program, calibration = setting(CASES[name], captured, sample=8)
    state = {key: value.clone() for key, value in program.weights.items()}
    whole = visit(program, calibration)
    pieces = visit(program, setting(CASES[name], captured, sample=8, max_memory=TINY)[3])
    assert equal(whole, pieces)
    # A KV cache is read as it was at the start, for every batch.
    assert all(torch.equal(program.weights[key], value) for key, value in state.items())


def lists(self, x: Tensor) -> Tensor:
    first, second, third = (x * 2).split(32, dim=-1)
    y = nn.functional.linear(first.tanh(), self.a) + nn.functional.linear(first, self.b)
    z = nn.functional.linear(second, self.c)
    return y + z + nn.functional.linear(third, self.d)


def constant(self, x: Tensor) -> Tensor:
    y = nn.functional.linear(x, self.a)
    late = nn.functional.linear(torch.tanh(y), self.b)
    return late + nn.functional.linear(x.square(), self.c) + nn.functional.linear(x, self.d)


@pytest.mark.parametrize(
    ("function", "width", "groups"), [(lists, 96, 4), (constant, 32, 3)], ids=["lists", "early"]
)
def test_values_of_earlier_pieces_reach_the_piece_that_taps_them(function, width, groups) -> None:
    parameters = {name: normal(32, 32, seed=ord(name)) for name in "abcd"}
    program = quantized(Function(function, **parameters), normal(3, width))
    batches = [(normal(rows, width, seed=rows),) for rows in (3, 1, 8)]
    whole = visit(program, Calibration(batches, device=CPU))
    pieces = visit(program, Calibration(batches, device=CPU, max_memory=TINY))
    assert len(whole) == groups
    assert all(int(result["tokens"]) == 12 for result in whole.values())
    assert equal(whole, pieces)


class Watch:
    """Work that looks at the folder while it is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[list[str]] = []

    def __call__(self, group: Group, statistics: InputStatistics):
        (place,) = self.folder.iterdir()
        found = place.glob("values/*/*")
        self.files.append(sorted(str(path.relative_to(place / "values")) for path in found))
        return keep(group, statistics)


def test_the_folder_holds_what_the_next_piece_needs(tmp_path: Path, captured) -> None:
    calibration = setting(CASES["llama"], captured, max_memory=TINY, folder=tmp_path)[3]
    watch = Watch(tmp_path)
    program = program_for(captured("llama"))
    visit(program, calibration, watch)
    names = [f"batch-0000{i}.safetensors" for i in range(4)]
    assert len(watch.files) == 9
    for number, files in enumerate(watch.files):
        pieces = [n for n in (number - 1, number) if 0 <= n < 8]
        assert files == [f"piece-{n:04}/{name}" for n in pieces for name in names]
    assert not list(tmp_path.glob("*/values/*"))
    assert len(list(tmp_path.glob("*/results/*.safetensors"))) == 9


def test_temporary_folders_disappear(tmp_path: Path, monkeypatch, captured) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def work(group: Group, statistics: InputStatistics):
        seen.append(len(list(tmp_path.iterdir())))
        if len(seen) == 3:
            raise KeyError("three")
        return keep(group, statistics)

    calibration = setting(CASES["vit"], captured, max_memory=TINY)[3]
    with pytest.raises(KeyError, match="three"):
        visit(program_for(captured("vit")), calibration, work)
    assert seen == [1, 1, 1]
    assert not list(tmp_path.iterdir())
    visit(program_for(captured("vit")), calibration)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("memory", [TINY, 1 << 30])
def test_an_input_that_is_no_number_names_layer_and_batch(value: float, memory: int) -> None:
    batches, _ = plain()
    batches[1][0, 17, 3] = value
    calibration = Calibration([(b,) for b in batches], device=CPU, max_memory=memory)
    with pytest.raises(NumericsError) as caught:
        visit(plain_program(), calibration)
    assert str(caught.value) == (
        "layer 'a': its input holds NaN/Inf for calibration batch 2. Run the original model "
        "on that batch to see where they begin: in the batch, or with the weight of a layer before."
    )


def test_nothing_to_visit_and_nothing_to_visit_with() -> None:
    program = plain_program()
    calibration = plain()[1]
    assert calibration.visit(program, [], keep, label="keep", progress=silent) == {}
    with pytest.raises(OptionError, match="the calibration data is empty; give at least one batch"):
        Calibration([], device=CPU)
    for options in ({"sample": 0}, {"max_memory": 0}):
        with pytest.raises(OptionError, match="needs memory and a sample of at least one token"):
            plain(**options)


def test_an_empty_batch_adds_nothing() -> None:
    program = plain_program()
    batches = [(normal(2, 5, 32),), (normal(0, 5, 32),)]
    found = visit(program, Calibration(batches, device=CPU))["a"]
    alone = visit(program, Calibration(batches[:1], device=CPU, sample=512))["a"]
    assert all(torch.equal(found[key], alone[key]) for key in found)
