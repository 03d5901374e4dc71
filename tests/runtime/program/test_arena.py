"""Memory that values share."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.runtime.program.arena import ALIGNMENT, Arenas, Lifetime, lay_out

LIVES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 30)), max_size=40
)


def lifetimes(drawn: list[tuple[int, int, int]]) -> dict[int, Lifetime]:
    return {i: Lifetime(n, min(a, b), max(a, b)) for i, (n, a, b) in enumerate(drawn)}


@settings(deadline=None, max_examples=200)
@given(LIVES)
def test_values_that_live_at_the_same_time_are_apart(drawn: list[tuple[int, int, int]]) -> None:
    lives = lifetimes(drawn)
    offsets, size = lay_out(lives)
    assert offsets.keys() == lives.keys()
    for key, life in lives.items():
        assert offsets[key] % ALIGNMENT == 0
        assert offsets[key] + life.nbytes <= size
        for other, its in lives.items():
            together = other != key and life.first <= its.last and its.first <= life.last
            ends_before = offsets[key] + life.nbytes <= offsets[other]
            starts_after = offsets[other] + its.nbytes <= offsets[key]
            assert not together or ends_before or starts_after


def test_a_chain_takes_two_places() -> None:
    lives = {i: Lifetime(1024, i, i + 1) for i in range(50)}
    assert lay_out(lives)[1] == 2048


def test_nothing_takes_nothing() -> None:
    assert lay_out({}) == ({}, 0)


def test_memory_that_was_given_back_is_used_again_if_it_is_large_enough() -> None:
    arenas = Arenas()
    first, second = arenas.take(100), arenas.take(50)
    assert first.data_ptr() != second.data_ptr()
    arenas.give_back(second)
    arenas.give_back(first)
    assert arenas.take(80) is first
    assert arenas.take(200).nbytes == 200
    assert arenas.take(10).nbytes >= 10
