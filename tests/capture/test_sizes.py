"""Which sizes vary: the first guess, what the model refuses, and the special size 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fpcompiler.capture import CapturedProgram, capture, export
from fpcompiler.capture.call import Leaf
from fpcompiler.capture.dynamic import Sizes, propose, refine
from fpcompiler.errors import CaptureError, OptionError
from fpcompiler.plan import Symbol
from tests.models import Llama, TiedLanguageModel, normal, token_ids


class Function(nn.Module):
    """A model with one linear layer and a function after it."""

    def __init__(self, function: Callable[..., Any], width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.function = function

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self.function(self.linear(x), *rest)


def shapes(program: CapturedProgram) -> list[tuple[int | str, ...]]:
    """Return the shapes of the inputs with the symbols named a, b, ... in order of appearance."""
    names: dict[str, str] = {}
    result = []
    for placeholder in program.placeholders:
        shape: list[int | str] = []
        for size in placeholder.shape:
            known = isinstance(size, int)
            shape.append(size if known else names.setdefault(size, "abcdef"[len(names)]))
        result.append(tuple(shape))
    return result


def groups(**tensors: Tensor) -> Mapping[str, tuple[tuple[int, int], ...]]:
    return propose([Leaf(name, tensor) for name, tensor in tensors.items()]).groups


def test_ids_and_masks_share_batch_and_length() -> None:
    ids, mask = token_ids(2, 5), torch.ones(2, 5)
    assert groups(ids=ids, mask=mask) == {
        "batch": ((0, 0), (1, 0)),
        "length": ((0, 1), (1, 1)),
    }


def test_images_vary_in_the_batch_only() -> None:
    assert groups(pixels=normal(2, 3, 8, 8), features=normal(2, 16)) == {
        "batch": ((0, 0), (1, 0)),
    }


def test_hidden_states_of_other_lengths_get_groups_of_their_own() -> None:
    found = groups(
        x=normal(2, 5, 8), context=normal(2, 7, 8), attention_mask=torch.ones(2, 1, 5, 7)
    )
    assert found == {
        "batch": ((0, 0), (1, 0), (2, 0)),
        "length": ((0, 1), (2, 2)),
        "length2": ((1, 1), (2, 3)),
    }


def test_a_vector_of_positions_belongs_to_the_length() -> None:
    ids, position = token_ids(1, 1), torch.arange(1)
    assert groups(ids=ids, position=position) == {"batch": ((0, 0),), "length": ((0, 1), (1, 0))}
    assert groups(ids=token_ids(2, 5), step=torch.arange(5)) == {
        "batch": ((0, 0),),
        "length": ((0, 1), (1, 0)),
    }


def test_empty_and_scalar_inputs_do_not_vary() -> None:
    assert groups(t=torch.tensor(1.0)) == {}
    assert groups(x=torch.ones(0, 4)) == {}


def test_examples_of_size_one_are_traced_with_distinct_sizes() -> None:
    sizes = propose([Leaf("ids", token_ids(1, 1)), Leaf("x", normal(1, 2))])
    ids, x = sizes.trace_tensors()
    assert ids.shape == (3, 4)
    assert x.shape == (3, 2)


def test_an_error_that_names_nothing_gives_no_sizes() -> None:
    sizes = propose([Leaf("ids", token_ids(2, 5))])
    assert refine(sizes, "something else went wrong") is None


def test_a_constraint_without_a_suggestion_fixes_the_sizes_it_names() -> None:
    sizes = propose([Leaf("ids", token_ids(2, 5))])
    refined = refine(sizes, "Constraints violated (length)! Not all values satisfy the guard.")
    assert refined is not None
    assert list(refined.groups) == ["batch"]


SIZE = "L['ids'].size()[1]"
DOUBT = (
    f"Constraints violated (length)!\n  - Not all values of length = {SIZE} in the specified range "
)


@pytest.mark.parametrize(
    ("guard", "holds"),
    [
        (f"min(16*{SIZE}, 32*{SIZE}) == (16*{SIZE})", True),
        (f"max(1, {SIZE}) == {SIZE}", True),
        (f"({SIZE} + 3) // 4 * 4 >= {SIZE}", True),
        (f"{SIZE} % 4 == 0", False),
        (f"{SIZE} <= 128", False),
        (f"16*{SIZE}", False),
        (f"{SIZE} // 0 == 1", False),
        (f"log({SIZE}) == 1", False),
        (f"not {SIZE}", False),
        ("a torch of the future ==", False),
    ],
)
def test_guards_that_always_hold_fix_no_size(guard: str, holds: bool) -> None:
    sizes = propose([Leaf("ids", token_ids(2, 5))])
    refined = refine(sizes, f"{DOUBT}satisfy the generated guard {guard}.")
    assert refined is not None
    assert refined.free == ({"length"} if holds else frozenset())
    assert list(refined.groups) == (["batch", "length"] if holds else ["batch"])
    if holds:  # the same error again is no reason to try the same again
        again = refine(refined, f"{DOUBT}satisfy the generated guard {guard}.")
        assert again is not None
        assert list(again.groups) == ["batch"]


def test_a_size_whose_range_torch_finds_may_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def freely(leaves: Sequence[Leaf]) -> Sizes:
        return replace(propose(leaves), free=frozenset({"length"}))

    monkeypatch.setattr(export, "propose", freely)
    ids = token_ids(2, 5)
    program = capture(Llama().eval(), (ids,))
    assert program.placeholders[0].shape == ("batch", "length")
    assert {name: symbol.min for name, symbol in program.symbols.items()} == {
        "batch": 1,
        "length": 1,
    }
    pairs = capture(Function(lambda x: x[:, 0] + x[:, 1], 8), (normal(2, 3, 8),))
    assert pairs.symbols["length"].min == 2


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_examples_of_any_size_give_a_graph_for_all_sizes(batch: int, length: int) -> None:
    model = TiedLanguageModel().eval()
    program = capture(model, (token_ids(batch, length),))
    assert shapes(program) == [("a", "b")]
    assert list(program.symbols.values()) == [Symbol(1), Symbol(1)]
    run = program.exported.module()
    for ids in (token_ids(1, 1), token_ids(1, 9), token_ids(4, 1), token_ids(3, 7)):
        assert torch.equal(run(ids), model(ids))


def test_a_size_that_the_code_needs_is_fixed_and_the_others_vary() -> None:
    model = Function(lambda x: torch.stack([row * 2 for row in x]))
    program = capture(model, (normal(3, 5, 8),))
    assert shapes(program) == [(3, "a", 8)]
    assert program.notes == (
        "dimension 0 of x is fixed at 3: the model's code works for this size only",
    )


def test_equal_sizes_that_mean_different_things_are_told_apart() -> None:
    model = Function(lambda x, table: x.sum() + table @ torch.ones(2, 5, 5))
    program = capture(model, (normal(2, 5, 8), normal(2, 5, 5)))
    assert shapes(program) == [("a", "b", 8), (2, "b", 5)]


def test_one_fixed_size_in_a_group_leaves_the_rest_varying() -> None:
    weight = torch.ones(5, 8)
    model = Function(lambda x, y: x.mean(1) + (y.transpose(1, 2) @ weight).mean(1))
    program = capture(model, (normal(2, 5, 8), normal(2, 5, 8)))
    assert shapes(program) == [("a", "b", 8), ("a", 5, 8)]
    (note,) = program.notes
    assert note.startswith("dimension 1 of rest_0 is fixed at 5")


def test_a_largest_size_is_found() -> None:
    table = torch.arange(16.0)
    model = Function(lambda x: x + table[: x.shape[1]][None, :, None])
    program = capture(model, (normal(2, 5, 8),))
    assert sorted(s.max or 0 for s in program.symbols.values()) == [0, 16]
    assert program.notes == ("dimension 1 of x is at most 16: so says the model",)


def test_a_branch_for_size_one_is_noticed() -> None:
    # torch.export takes the condition for false without a guard.
    model = Function(lambda x: x * 2 if x.shape[0] == 1 else x + 1)
    program = capture(model, (normal(2, 5, 8),))
    assert sorted(s.min for s in program.symbols.values()) == [1, 2]
    assert program.notes == (
        "dimension 0 of x is at least 2: with 1 the model takes another path, which the graph does "
        "not have",
    )
    ranges = program.exported.range_constraints.values()
    assert sorted(int(r.lower) for r in ranges) == [1, 2]


def test_a_branch_for_both_sizes_one_is_noticed() -> None:
    model = Function(lambda x: x * 2 if x.shape[0] * x.shape[1] == 1 else x + 1)
    program = capture(model, (normal(2, 5, 8),))
    assert [s.min for s in program.symbols.values()] == [2, 2]
    assert len(program.notes) == 2


def test_a_model_that_refuses_size_one() -> None:
    def refuse(x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise ValueError("one token is not enough")
        return x + 1

    program = capture(Function(refuse), (normal(2, 5, 8),))
    (note,) = program.notes
    assert note == (
        "dimension 1 of x is at least 2: with 1 the model itself fails "
        "(ValueError: one token is not enough)"
    )


def test_a_random_model_is_not_mistaken_for_another_path() -> None:
    program = capture(Function(lambda x: x + torch.randn_like(x)), (normal(2, 5, 8),))
    assert program.notes == ()
    assert all(s.min == 1 for s in program.symbols.values())


@pytest.mark.parametrize("dynamic", [None, False])
def test_all_sizes_can_be_fixed(dynamic: bool | None) -> None:
    program = capture(Function(torch.relu), (normal(2, 5, 8),), dynamic=dynamic)
    assert shapes(program) == [(2, 5, 8)]
    assert program.symbols == {}
    assert program.notes == ()


@pytest.mark.parametrize("dynamic", [{"x": {1: Dim("n", max=9)}}, ({1: Dim("n", max=9)},)])
def test_own_dynamic_shapes_are_used(dynamic: Any) -> None:
    program = capture(Function(torch.add), (normal(2, 5, 8), normal(2, 1, 8)), dynamic=dynamic)
    assert shapes(program) == [(2, "a", 8), (2, 1, 8)]
    assert list(program.symbols.values()) == [Symbol(1, 9)]


def test_sizes_that_depend_on_another_are_expressions() -> None:
    half = Dim("half", min=2, max=50)
    program = capture(nn.ReLU(), (normal(2, 8, 3),), dynamic=({1: 2 * half},))
    ((_, expression, _),) = [p.shape for p in program.placeholders]
    (symbol,) = program.symbols
    assert expression == f"2*{symbol}"


def test_sizes_have_the_names_of_the_user() -> None:
    model = Function(lambda x, y: x.mean(1) + y.mean((1, 2)))
    rows, half = Dim("rows"), Dim("half", min=2, max=50)
    dims = {"x": {0: rows, 1: Dim("words")}, "rest": ((rows, 2 * half, None, None),)}
    program = capture(model, (normal(2, 5, 8), normal(2, 6, 3, 8)), dynamic=dims)
    assert [p.shape for p in program.placeholders] == [
        ("rows", "words", 8),
        ("rows", "2*half", 3, 8),
    ]
    assert {*program.symbols} == {"rows", "words", "half"}


def test_sizes_that_were_found_are_named_after_what_they_are() -> None:
    program = capture(Function(torch.add), (normal(2, 5, 8), normal(2, 5, 8)))
    assert [p.shape for p in program.placeholders] == [("batch", "length", 8)] * 2


def test_sizes_without_a_name_are_named_after_inputs() -> None:
    dims = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = capture(Function(torch.relu), (normal(2, 5, 8),), dynamic=dims)
    assert [p.shape for p in program.placeholders] == [("x_dim0", "x_dim1", 8)]
    assert [*program.symbols] == ["x_dim0", "x_dim1"]


def test_dynamic_shapes_for_unknown_arguments() -> None:
    with pytest.raises(CaptureError, match=r"dynamic names 'z', but the example inputs are x"):
        capture(Function(torch.relu), (normal(2, 5, 8),), dynamic={"z": {0: Dim("n")}})
    with pytest.raises(CaptureError, match=r"dynamic has 2 entries for 1 example inputs"):
        capture(nn.ReLU(), (normal(2, 5, 8),), dynamic=({}, {}))
    with pytest.raises(OptionError, match=r"dynamic='sometimes': expected 'auto'"):
        capture(nn.ReLU(), (normal(2, 5, 8),), dynamic="sometimes")  # type: ignore[arg-type]


def test_tensors_in_keyword_arguments_without_a_name_fix_all_sizes() -> None:
    class Keywords(nn.Module):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return x + more["y"]

    program = capture(Keywords(), (normal(2, 5),), {"y": normal(2, 5)})
    assert shapes(program) == [(2, 5), (2, 5)]
    assert "torch.export cannot vary sizes when **kwargs holds tensors (y)" in program.notes[0]


def test_a_size_among_the_results_is_a_leaf() -> None:
    program = capture(Function(lambda x: (x, x.shape[0], None, 3)), (normal(2, 5, 8),))
    assert [c["t"] for c in program.signature.outputs["c"]] == ["leaf", "leaf", "none", "const"]
    assert program.notes == ()


def test_capture_takes_one_export_when_the_guess_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    export = torch.export.export

    def counting(*args: Any, **kwargs: Any) -> Any:
        exports.append(kwargs["dynamic_shapes"])
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counting)
    capture(Llama(layers=1), (token_ids(2, 5),))
    assert len(exports) == 1


class OneText(nn.Module):
    """Writes to a buffer for one text; tracing does not see that it refuses others."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and len(x) > 1:
            raise ValueError("one text at a time")
        self.cache.add_(1)
        return x + self.cache


def test_a_model_that_writes_to_buffers_runs_with_the_sizes_it_was_traced_with() -> None:
    program = capture(OneText(), (normal(1, 4, 8),))
    assert program.placeholders[0].shape == (1, 4, 8)
    assert any("one text at a time" in note for note in program.notes)
