"""The frontier of sizes and damages: exact where states are few, close where they are thinned."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError
from fpcompiler.numerics.mixed import Frontier

CHOICE = st.tuples(st.integers(1, 30), st.integers(0, 50).map(float))
LAYERS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=5)


def frontier(layers, **options) -> Frontier:
    return Frontier(
        [[size for size, _ in row] for row in layers],
        [[damage for _, damage in row] for row in layers],
        **options,
    )


@settings(deadline=None, max_examples=60)
@given(LAYERS)
def test_every_budget_gets_the_least_damage_of_all_choices(layers) -> None:
    every = [
        (sum(size for size, _ in chosen), sum(damage for _, damage in chosen))
        for chosen in itertools.product(*layers)
    ]
    found = frontier(layers)
    assert found.least == min(size for size, _ in every)
    for room in range(found.least, found.most + 3):
        point = found.within(room)
        assert point.damage == min(damage for size, damage in every if size <= room)
        chosen = [row[number] for row, number in zip(layers, point.chosen, strict=True)]
        assert point.size == sum(size for size, _ in chosen) <= room
        assert point.damage == sum(damage for _, damage in chosen)


@settings(deadline=None, max_examples=30)
@given(LAYERS, st.integers(2, 6))
def test_few_states_give_choices_that_fit_and_keep_the_least_size(layers, most: int) -> None:
    exact, few = frontier(layers), frontier(layers, most_states=most)
    assert len(few) <= most
    assert few.least == exact.least
    for point in few.spread(8):
        assert point.damage >= exact.within(point.size).damage
        chosen = [row[number] for row, number in zip(layers, point.chosen, strict=True)]
        assert point.size == sum(size for size, _ in chosen)


def test_many_layers_of_irregular_sizes_stay_close_to_the_best() -> None:
    sizes = [[(7919 * i % 1000 + 500) * bits for bits in (4, 6, 8)] for i in range(80)]
    damages = [[(31 * i % 97 + 1) * part for part in (1.0, 0.1, 0.01)] for i in range(80)]
    exact = Frontier(sizes, damages)
    few = Frontier(sizes, damages, most_states=512)
    assert len(exact) > 5 * len(few)
    room = (exact.least + exact.most) // 2
    assert few.within(room).damage <= 1.05 * exact.within(room).damage


def test_of_equal_choices_the_first_is_taken() -> None:
    assert frontier([[(4, 1.0), (4, 1.0), (6, 1.0)]]).within(9).chosen == (0,)


def test_points_are_spread_from_the_least_to_the_largest_size() -> None:
    found = frontier([[(4, 16.0), (6, 1.0), (8, 0.0)]] * 4)
    points = found.spread(5)
    assert [point.size for point in points] == [16, 20, 24, 28, 32]
    assert [point.damage for point in points] == [64.0, 34.0, 4.0, 2.0, 0.0]
    assert len(found.spread(100)) == len(found)


def test_a_model_without_choices_has_one_point() -> None:
    assert Frontier([], []).within(0).chosen == ()


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(NumericsError, match="a size of 3 cannot be reached; the least is 4"):
        frontier([[(4, 1.0)]]).within(3)
    with pytest.raises(NumericsError, match="each layer needs choices"):
        Frontier([[4], []], [[1.0], []])
    with pytest.raises(NumericsError, match="each layer needs choices"):
        Frontier([[4]], [[1.0, 2.0]])
