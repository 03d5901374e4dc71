"""The benchmark of linear layers on the CPU: that it runs, and what it concludes from times."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmarks import cpu
from examples.benchmarks.cpu_linear import timing
from examples.benchmarks.cpu_linear.bars import BARS, BEST_INT4, verdicts
from examples.benchmarks.cpu_linear.ggml import ggml
from examples.benchmarks.cpu_linear.peers import CEILINGS, SCHEMES, versions
from examples.benchmarks.cpu_linear.problem import (
    MOST_COPIES,
    Peer,
    Problem,
    UnsuitableError,
    Work,
    nibbles,
    relative_error,
    signed_blocks,
)
from examples.benchmarks.cpu_linear.timing import Timing, measure, speed
from fpcompiler import native

TORCH_PEERS = (
    "torch-bf16", "torch-fp32", "torch-int8", "onednn-bf16", "onednn-int8", "aten-int4",
)  # fmt: skip
OTHERS = ("onnxruntime", "openvino", "llama_cpp")
SHAPE = ("--shapes", "64x128", "--threads", 1, "--rounds", 3, "--slot-ms", 0.1, "--cold-mb", 0.05)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTHERS:
        monkeypatch.setitem(sys.modules, name, None)
    ggml.cache_clear()


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu.py", *map(str, words)])
    cpu.main()


def by_peer(path: Path, rows: int) -> dict[str, dict[str, Any]]:
    results = json.loads(path.read_text())["results"]
    return {entry["peer"]: entry for entry in results if entry["rows"] == rows}


def timings(**seconds: float) -> dict[str, Timing]:
    named = {name.replace("_", "-"): value for name, value in seconds.items()}
    return {name: Timing((value,) * 3, (True,) * 3) for name, value in named.items()}


def problem(n: int, k: int, m: int = 2, cold_bytes: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, k, generator=generator) for rows in (n, m))
    return Problem(weight, x, 1, cold_bytes)


def test_a_run_of_the_peers_in_torch_and_of_all_schemes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "cpu.json"
    run(
        monkeypatch, *SHAPE, "--rows", 1, 3, "--kernel", "reference", "--peers", *TORCH_PEERS,
        "--out", out,
    )  # fmt: skip
    for rows in (1, 3):
        found = by_peer(out, rows)
        assert [name for name in found if name not in {peer.name for peer in CEILINGS}] == [
            *TORCH_PEERS, *SCHEMES,
        ]  # fmt: skip
        for name, entry in found.items():
            if "missing" in entry or name in {peer.name for peer in CEILINGS}:
                continue
            assert entry["copies"] == min(MOST_COPIES, -(-50_000 // entry["weight_bytes"]))
            assert len(entry["rounds_microseconds"]) == 3
            assert entry["microseconds"] == statistics.median(entry["rounds_microseconds"])
        assert all(0.05 < found[name]["relative_error"] < 0.2 for name in SCHEMES)
        assert found["torch-fp32"]["relative_error"] < 1e-6
        pairs = zip(
            found["torch-bf16"]["rounds_microseconds"], found["w4a6"]["rounds_microseconds"],
            strict=True,
        )  # fmt: skip
        ratio = statistics.median(a / b for a, b in pairs)
        assert found["w4a6"]["speed_to_torch_bf16"] == pytest.approx(ratio, rel=1e-2)
    record = json.loads(out.read_text())
    assert record["settings"]["kernel"] == "reference"
    assert record["versions"]["torch"] == torch.__version__
    assert record["bars"] == []
    text = capsys.readouterr().out
    assert "64 x 128, threads: 1" in text
    assert "fpcompiler w4a6-row" in text


@pytest.mark.skipif(native.library() is None, reason="the native library is not built")
def test_the_native_layers_and_the_ceilings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cpu.json"
    run(monkeypatch, *SHAPE, "--rows", 5, "--peers", "torch-bf16", "--out", out)
    found = by_peer(out, 5)
    assert found.keys() == {"torch-bf16", "read", "int8-peak", *SCHEMES}
    assert not any("missing" in entry for entry in found.values())
    assert found["read"]["weight_bytes"] == 64 * 128 // 2
    assert found["nvfp4"]["weight_bytes"] > found["w4a6-row"]["weight_bytes"] >= 64 * 128 // 2


@pytest.mark.usefixtures("without_others")
def test_what_is_not_installed_is_a_row_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cpu.json"
    words = (*SHAPE, "--rows", 1, "--schemes", "--kernel", "reference", "--out", out)
    run(monkeypatch, *words)
    found = by_peer(out, 1)
    assert found["ort-int4-b32"]["missing"].endswith("is not installed")
    assert found["openvino-int4"]["missing"] == "openvino is not installed"
    assert found["ggml-q4_0"]["missing"] == "llama_cpp is not installed"
    assert "ggml-q4_0 on 64 x 128: llama_cpp is not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"cpu\.py: openvino-int4: openvino is not installed"):
        run(monkeypatch, *words, "--peers", "openvino-int4")
    assert "ggml" not in versions()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kernel", "reference"), "give another --out"),
        (("--peers", "fast"), "invalid choice"),
        (("--shapes", "64"), "invalid shape value"),
    ],
)
def test_options_that_are_refused(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert message in capsys.readouterr().err


def test_quick_changes_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--quick", "--rounds", "4"])
    options = cpu.arguments()
    assert (options.rounds, options.cold_mb, options.out) == (4, 1, None)
    assert options.shapes == cpu.SHAPES[2:]
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--shapes", "8x16"])
    options = cpu.arguments()
    assert (options.shapes, options.rounds, options.out) == ([(8, 16)], 15, cpu.OUT)


def test_an_unknown_scheme_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no scheme 'w4a7'"):
        run(monkeypatch, *SHAPE, "--schemes", "w4a7")


def test_a_wrong_result_is_not_timed() -> None:
    given = problem(8, 16)
    right = given.x @ given.weight.T
    work = Work(lambda i: None, lambda: 1.1 * right, 0, 1)
    assert relative_error(work, given) == pytest.approx(0.1, rel=1e-3)
    cpu.build(Peer("p", "p", 0.11, lambda _: work), given, explicit=True)
    with pytest.raises(UnsuitableError, match=r"its result is wrong: relative error 0\.1"):
        cpu.build(Peer("p", "p", 0.09, lambda _: work), given, explicit=True)
    nan = Work(lambda i: None, lambda: right / 0 * 0, 0, 1)
    with pytest.raises(UnsuitableError, match="wrong: relative error nan"):
        cpu.build(Peer("p", "p", 0.09, lambda _: nan), given, explicit=True)


def test_a_peer_that_fails_is_a_row() -> None:
    def build(_: Problem) -> Work:
        raise RuntimeError("no such instruction\nbacktrace")

    with pytest.raises(UnsuitableError, match=r"^it failed: no such instruction$"):
        cpu.build(Peer("p", "p", 0.1, build), problem(8, 16), explicit=True)


@pytest.mark.parametrize(
    ("size", "cold", "copies"), [(10, 0, 1), (10, 95, 10), (10, 10_000, MOST_COPIES), (200, 100, 1)]
)
def test_copies_fill_what_is_cold(size: int, cold: int, copies: int) -> None:
    assert problem(1, 1, cold_bytes=cold).copies(size) == copies


def test_codes_of_four_bits() -> None:
    values, scale = signed_blocks(torch.tensor([[7.0, -14.0, 1.0, 0.4]]), 2)
    assert values.tolist() == [[[4, -7], [7, 3]]]
    assert scale.flatten().tolist() == pytest.approx([2, 1 / 7])
    assert nibbles(values).tolist() == [[[0x94], [0x37]]]


def test_candidates_take_turns_and_go_through_their_copies() -> None:
    calls: dict[str, list[int]] = {"one": [], "two": []}
    works = {
        "one": Work(calls["one"].append, None, 0, 3),
        "two": Work(calls["two"].append, None, 0, 4, products=4),
    }
    found = measure(works, threads=1, rounds=5, slot=0)
    assert calls["one"] == [i % 3 for i in range(4 + 5)]
    assert len(calls["two"]) == 2 + 5
    assert [len(t.seconds) for t in found.values()] == [5, 5]
    assert all(t.clean == (True,) * 5 for t in found.values())


def test_interrupted_slots_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = iter([(1e-3, 0), (9e-3, 1), (2e-3, 0), (3e-3, 0), (0.9, 2)])
    monkeypatch.setattr(timing, "_slot", lambda *_: next(slots))
    found = measure({"a": Work(lambda i: None, None, 0, 1)}, threads=2, rounds=5, slot=0)["a"]
    # Two interruptions are less than a hundredth of 0.9 seconds.
    assert found.clean == (True, False, True, True, True)
    assert found.median == statistics.median([1e-3, 2e-3, 3e-3, 0.9])


def test_ratios_are_of_rounds_in_which_both_are_clean() -> None:
    ours = Timing((1.0, 1.0, 9.0, 2.0, 4.0), (True, True, False, True, True))
    other = Timing((2.0, 4.0, 1.0, 6.0, 1.0), (True, True, True, True, False))
    assert speed(ours, other) == timing.Speed(3.0, is_noisy=False)
    noisy = Timing(other.seconds, (True, True, False, False, False))
    assert speed(ours, noisy) == timing.Speed(2.0, is_noisy=True)
    assert noisy.is_noisy
    assert noisy.median == 2.0


def test_bars() -> None:
    found = timings(w4a6=1.0, torch_bf16=3.5, ort_int4_b32=1.7, aten_int4=9.0)
    reached = {v.bar.peer: v for v in verdicts((4096, 4096), 16, found)}
    assert reached["torch-bf16"].is_passed
    best = reached[BEST_INT4]
    assert best.measured == timing.Speed(1.7, is_noisy=False)
    assert not best.is_passed
    first = verdicts((11008, 4096), 1, found)
    missing = [v for v in first if v.measured is None]
    assert {v.bar.peer for v in missing} == {"onednn-bf16", "ggml-mxfp4", "read"}
    assert not any(v.is_passed for v in missing)
    assert verdicts((4096, 4096), 4, found) == verdicts((576, 576), 1, found) == []


def test_a_noisy_ratio_reaches_no_bar() -> None:
    quiet, noisy = timings(w4a6=1.0)["w4a6"], Timing((99.0,) * 3, (False,) * 3)
    (verdict,) = [
        v
        for v in verdicts((4096, 4096), 512, {"w4a6": quiet, "onednn-int8": noisy})
        if v.measured is not None
    ]
    assert verdict.measured == timing.Speed(99.0, is_noisy=True)
    assert not verdict.is_passed


def test_every_bar_is_about_rows_of_the_benchmark() -> None:
    names = {peer.name for peer in (*CEILINGS, *cpu.PEERS)} | {BEST_INT4}
    assert {bar.peer for bar in BARS} <= names
    assert {bar.scheme for bar in BARS} <= set(SCHEMES)
    assert {bar.rows for bar in BARS} <= set(cpu.ROWS)
