"""The fit of the model of times on Hopper: that it finds what is there, and is current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.benchmarks import hopper_costs as script
from fpcompiler.runtime.costs.hopper import FILE, Plain, Tile

RECORD: dict[str, Any] = json.loads(script.RECORD.read_text())
STORED: dict[str, Any] = json.loads(script.OUTPUT.read_text())
AGAIN = f"python examples/benchmarks/hopper_costs.py --write, and commit {FILE}"


def test_the_numbers_in_use_are_fitted_to_the_record() -> None:
    found = script.fit(RECORD)
    assert {
        name: [[*vars(tile).values()] for tile in tiles] for name, tiles in found.tiles.items()
    } == STORED["tiles"], AGAIN
    assert (found.few_tokens, found.few_bytes) == (STORED["few_tokens"], STORED["few_bytes"]), AGAIN
    assert vars(found.plain) == pytest.approx(STORED["bf16"], rel=1e-3), AGAIN
    for name, kind in found.kinds.items():
        stored = STORED["kinds"][name]
        assert kind.few == pytest.approx(stored["few"], rel=1e-2, abs=1e-6), AGAIN
        assert kind.rate == pytest.approx(stored["rate"], rel=1e-2), AGAIN
        assert kind.quantize == pytest.approx(stored["quantize"], rel=1e-2, abs=1e-6), AGAIN
    assert {*found.kinds} == {*STORED["kinds"]}
    errors = [e for row in script.errors_of(found, RECORD).values() for e in row]
    assert script.summary(errors) == {
        n: pytest.approx(STORED["errors"][n], abs=2e-3) for n in ("median", "worst")
    }
    assert all(STORED[name] == RECORD[name] for name in ("device", "date", "torch"))


def test_few_verdicts_are_the_other_way() -> None:
    wrong = script.verdicts_of(script.HopperCosts.of(STORED), RECORD)
    assert len(wrong) <= 0.08 * len(RECORD["rows"]) * len(RECORD["modes"])
    # Layers of a thousand inputs are about as fast as in bf16, whose jumps the model smooths.
    large = [row for row in wrong if row[1].k > 3000]
    assert len(large) <= 0.03 * len(RECORD["rows"]) * len(RECORD["modes"])
    assert all(abs(predicted - measured) < 0.22 for *_, predicted, measured in wrong)


def test_a_fit_finds_the_numbers_that_times_were_made_with() -> None:
    plain = Plain(5.0, 3e6, 6e8, 2.5)
    rows = [
        (call, plain.microseconds(call.m, call.n, call.k))
        for call, _ in script.layer_rows(RECORD, "bf16")
    ]
    found = script.fit_plain(rows)
    assert vars(found) == pytest.approx(vars(plain), rel=0.05)


def test_factors_are_not_negative() -> None:
    terms = [(1.0, float(x), float(x) ** 2) for x in range(5)]
    assert script.nonnegative(terms, [2 + 3 * x for x, *_ in enumerate(terms)]) == pytest.approx(
        [2, 3, 0], abs=1e-6
    )
    assert script.nonnegative([(1.0, 1.0), (1.0, 2.0)], [2.0, 1.0])[1] == 0
    assert script.nonnegative([(1.0,)], [-1.0]) == [0.0]


def test_tiles_are_read_from_the_header() -> None:
    text = """template <class P> struct ManyTiles<P, kInt8> {
    using List = TileList<
        TimedTile<ManyTile<256>, 4250, 610>, TimedTile<ManyTile<64, 2, 1>, 10, 20, 2>>;
};"""
    assert script.tiles_of_header(text) == {
        "int8": (Tile(256, 1, 2, 4250, 610, 1), Tile(64, 2, 1, 10, 20, 2))
    }


def test_sizes_left_out_are_predicted_from_the_others() -> None:
    rows = [row for row in RECORD["rows"] if row["n"] * row["k"] in (4096**2, 4096 * 14336)]
    found = script.left_out({**RECORD, "rows": rows})
    assert {*found} == {"4096 x 4096", "14336 x 4096", "4096 x 14336"}
    assert all(script.summary(row)["worst"] > 0.001 for row in found["4096 x 4096"].values())


def test_it_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "OUTPUT", tmp_path / FILE)
    monkeypatch.setattr(script, "left_out", lambda record: {})
    monkeypatch.setattr(sys, "argv", ["hopper_costs.py"])
    script.main()
    assert not (tmp_path / FILE).exists()
    assert "all: median" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["hopper_costs.py", "--write"])
    script.main()
    written = json.loads((tmp_path / FILE).read_text())
    assert written["kinds"] == STORED["kinds"]
