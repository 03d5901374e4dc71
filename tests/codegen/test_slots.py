"""How many compilers fit into memory."""

import threading

import pytest

from fpcompiler.codegen import slots
from fpcompiler.codegen.slots import NVCC_BYTES, available_memory, slot, slot_count


@pytest.mark.parametrize(
    ("memory", "count"), [(0, 1), (NVCC_BYTES, 1), (24 * 10**9, 3), (64 * 2**30, 10)]
)
def test_slots_of_a_machine(memory, count) -> None:
    assert slot_count(memory) == count


def test_the_limit_of_a_container_counts(tmp_path) -> None:
    total, free = available_memory(tmp_path)
    assert 0 < free <= total
    (tmp_path / "memory.max").write_text("1000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("400\n", encoding="ascii")
    assert available_memory(tmp_path) == (1000, 600)
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert available_memory(tmp_path)[0] == total


def test_a_full_machine_still_runs_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(slots, "available_memory", lambda: (4 * NVCC_BYTES, 0))
    order: list[str] = []

    def second() -> None:
        with slot(tmp_path):
            order.append("second")

    with slot(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_with_memory_two_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(slots, "available_memory", lambda: (2 * NVCC_BYTES, NVCC_BYTES))
    with slot(tmp_path), slot(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"slot-0", "slot-1"}
