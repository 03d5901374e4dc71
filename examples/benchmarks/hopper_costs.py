"""Fits the model of times on Hopper to recorded ones, and says how far off it is.

    python examples/benchmarks/hopper_costs.py          # prints; --write stores the numbers

reads ``results/hopper_layers.json`` and the tiles of ``choose_many.h``, and writes
``runtime/costs/sm_90a.json``. Relative errors are of the layers that were fitted and, for each
size, of a fit that had not seen that size: what may be expected of sizes that were not measured.
No GPU is needed. A test keeps the file current.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpcompiler.operand import Operand
from fpcompiler.runtime.costs import SLOWER, LayerCall
from fpcompiler.runtime.costs.hopper import FILE, HopperCosts, Kind, Plain, Tile, kind_of
from fpcompiler.scheme.presets import find_preset

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "examples" / "benchmarks" / "results" / "hopper_layers.json"
OUTPUT = ROOT / "runtime" / "costs" / FILE
HEADERS = ROOT / "codegen" / "hopper"
SMS = 132
RESERVED = 27 << 10
"""Bytes of shared memory for sums, about; the rest of it is for activations of few tokens."""

LISTS = {
    "ManyTiles<P, kInt8>": "int8",
    "ManyTiles<P, kE4m3>": "fp8",
    "TilesWithoutBlocks": "bf16",
    "TilesOfBlocks": "bf16, blocks",
}
NO_KIND = Kind((0.0,) * 4, 1.0, (0.0,) * 2)

Row = tuple[LayerCall, float]
"""A layer, and the microseconds that it took."""


def tiles_of_header(text: str) -> dict[str, tuple[Tile, ...]]:
    """Return the lists of tiles in ``choose_many.h``."""
    found = {}
    for name, body in re.findall(
        r"struct (\w+(?:<[^>]*>)?) \{\s*using List = TileList<(.*?)>;", text, re.S
    ):
        if name not in LISTS:
            continue
        rows = re.findall(r"TimedTile<ManyTile<([\d, ]+)>, (\d+), (\d+)(?:, (\d+))?>", body)
        found[LISTS[name]] = tuple(
            Tile(*_shape(shape), int(fixed), int(each), int(at_once or 1))
            for shape, fixed, each, at_once in rows
        )
    return found


def _shape(text: str) -> tuple[int, int, int]:
    """Return tokens, split and groups of a ManyTile, with its defaults."""
    given = [int(number) for number in text.split(",")]
    tokens, split, groups = [*given, *(1, 2)[len(given) - 1 :]]
    return tokens, split, groups


def constant(name: str, file: str) -> int:
    """Return an integer of a header."""
    found = re.search(rf"{name} = (\d+)(?: << (\d+))?;", (HEADERS / file).read_text("utf-8"))
    assert found is not None, f"{file} has no {name}"
    return int(found[1]) << int(found[2] or 0)


def layer_rows(record: Mapping[str, Any], scheme: str) -> list[Row]:
    """Return the recorded layers of a scheme; those of cuBLAS are layers too."""
    preset = find_preset("w4a16" if scheme == "bf16" else scheme)
    weight = Operand.parse(preset.weight)
    activation = None if preset.activation == "none" else Operand.parse(preset.activation)
    return [
        (LayerCall(row["m"], row["n"], row["k"], weight, activation), 1e6 * row["seconds"][scheme])
        for row in record["rows"]
    ]


def kinds_of(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the recorded layers of each kind; of schemes of one kind, all."""
    found: dict[str, list[Row]] = {}
    for scheme in record["modes"]:
        for call, time in layer_rows(record, scheme):
            name = kind_of(call.weight, call.activation)
            assert name is not None, scheme
            found.setdefault(name, []).append((call, time))
    return found


def nonnegative(terms: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Return the factors of at least 0 with the least squares, of all choices of those above 0."""
    a, b = torch.tensor(terms, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    count = a.shape[1]
    best, least = [0.0] * count, float(b.square().sum())
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = a[:, chosen]
            x = torch.linalg.lstsq(part, b[:, None], driver="gelsd").solution
            error = float((part @ x - b[:, None]).square().sum())
            if bool((x >= 0).all()) and error < least:
                best = [0.0] * count
                for index, factor in zip(chosen, x[:, 0].tolist(), strict=True):
                    best[index] = factor
                least = error
    return best


def descend(loss: Callable[[list[float]], float], start: Sequence[float]) -> list[float]:
    """Return positive numbers with a small loss: each is raised and lowered by ever less."""
    best, least, step = [*start], loss([*start]), 0.3
    while step > 1e-4:
        improved = False
        for index, factor in itertools.product(range(len(best)), (1 + step, 1 / (1 + step))):
            trial = [*best]
            trial[index] *= factor
            found = loss(trial)
            if found < least:
                best, least, improved = trial, found, True
        step = step if improved else step / 2
    return best


def fit_plain(rows: Sequence[Row]) -> Plain:
    """Return the model of cuBLAS with the least squares of relative errors."""

    def loss(numbers: list[float]) -> float:
        plain = Plain(*numbers)
        found = (plain.microseconds(c.m, c.n, c.k) / time for c, time in rows)
        return sum(math.log(ratio) ** 2 for ratio in found)

    return Plain(*descend(loss, (4.0, 4e6, 7e8, 3.0)))


def fit_kind(costs: HopperCosts, name: str, rows: Sequence[Row]) -> Kind:
    """Return the numbers of a kind with the least squares of relative errors."""

    def fitted(rate: float) -> Kind:
        trial = replace(costs, kinds={name: Kind((), rate, ())})
        factors = []
        for few, count in ((True, 4), (False, 2)):
            own = [(c, time) for c, time in rows if costs.has_few(c, name) == few]
            terms = [[term / time for term in trial.terms(c, name)] for c, time in own]
            rest = [1 - trial.base(c, name) / time for c, time in own]
            factors.append(nonnegative(terms, rest) if own else [0.0] * count)
        return Kind(tuple(factors[0]), rate, tuple(factors[1]))

    def loss(numbers: list[float]) -> float:
        trial = replace(costs, kinds={name: fitted(*numbers)})
        return sum((trial.microseconds(c, name) / time - 1) ** 2 for c, time in rows)

    starts = (5e8, 8e8, 1.3e9)
    ends = [descend(loss, (start,)) for start in starts]
    return fitted(*min(ends, key=loss))


def fit(record: Mapping[str, Any]) -> HopperCosts:
    """Return the model of a record, without the errors."""
    plain = fit_plain(layer_rows(record, "bf16"))
    kinds = kinds_of(record)
    costs = HopperCosts(
        record={},
        sms=SMS,
        few_tokens=constant("kMostFewTokens", "gemm_few.h"),
        few_bytes=constant("kSharedBytes", "problem.h") - RESERVED,
        plain=plain,
        tiles=tiles_of_header((HEADERS / "choose_many.h").read_text("utf-8")),
        kinds=dict.fromkeys(kinds, NO_KIND),
    )
    return replace(costs, kinds={name: fit_kind(costs, name, kinds[name]) for name in kinds})


def errors_of(costs: HopperCosts, record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return predicted over measured, less 1, for each candidate of a record."""
    found = {}
    for scheme in ("bf16", *record["modes"]):
        found[scheme] = []
        for call, time in layer_rows(record, scheme):
            predicted = costs.predict(call)
            assert not isinstance(predicted, str)
            own = predicted.bf16_microseconds if scheme == "bf16" else predicted.microseconds
            found[scheme].append(own / time - 1)
    return found


Verdict = tuple[str, LayerCall, float, float]
"""A scheme, a layer, and how many times as fast as bf16 it is: predicted, and measured."""


def verdicts_of(costs: HopperCosts, record: Mapping[str, Any]) -> list[Verdict]:
    """Return the layers that are called slower and are not, or the reverse."""
    plain = [time for _, time in layer_rows(record, "bf16")]
    wrong = []
    for scheme in record["modes"]:
        for (call, time), bf16 in zip(layer_rows(record, scheme), plain, strict=True):
            predicted = costs.predict(call)
            assert not isinstance(predicted, str)
            if predicted.is_slower != (bf16 / time < SLOWER):
                wrong.append((scheme, call, predicted.speed, bf16 / time))
    return wrong


def left_out(record: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the errors on each size of a model that was fitted without that size."""
    sizes = sorted({(row["n"], row["k"]) for row in record["rows"]})
    found = {}
    for size in sizes:
        inside = [row for row in record["rows"] if (row["n"], row["k"]) == size]
        outside = [row for row in record["rows"] if (row["n"], row["k"]) != size]
        costs = fit({**record, "rows": outside})
        found["{} x {}".format(*size)] = errors_of(costs, {**record, "rows": inside})
    return found


def summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = [abs(error) for error in errors]
    return {"median": round(statistics.median(sizes), 3), "worst": round(max(sizes), 3)}


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stored."""
    costs = fit(record)
    errors = errors_of(costs, record)
    every = [error for row in errors.values() for error in row]
    unseen = left_out(record)
    sizes = [size for row in record["rows"] for size in (row["n"], row["k"])]
    return {
        "source": RECORD.relative_to(ROOT).as_posix(),
        **{name: record[name] for name in ("device", "date", "torch")},
        "sizes": [min(sizes), max(sizes)],
        "sms": costs.sms,
        "few_tokens": costs.few_tokens,
        "few_bytes": costs.few_bytes,
        "bf16": _rounded(asdict(costs.plain)),
        "kinds": {name: _rounded(asdict(kind)) for name, kind in costs.kinds.items()},
        "tiles": {
            name: [[*asdict(tile).values()] for tile in tiles]
            for name, tiles in costs.tiles.items()
        },
        "errors": {
            **summary(every),
            "candidates": {name: summary(row) for name, row in errors.items()},
            "sizes left out": {
                size: {name: summary(row) for name, row in rows.items()}
                for size, rows in unseen.items()
            },
        },
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}")


def text_of(found: Mapping[str, Any]) -> str:
    """Return the text of the file: a line for each innermost list or group of numbers."""
    text = json.dumps(found, indent=1)
    inner = re.compile(r"[\[{]\s*[^\[\]{}]*?[\]}]")
    text = inner.sub(lambda match: re.sub(r"\s+", " ", match[0]), text)
    return text + "\n"


def show(found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    errors = found["errors"]
    print(f"{found['device']}, {found['date']}: {len(record['rows'])} sizes and numbers of tokens")
    print(f"all: median {errors['median']:.1%}, worst {errors['worst']:.1%}")
    for name, row in errors["candidates"].items():
        print(f"  {name:10} median {row['median']:6.1%}   worst {row['worst']:6.1%}")
    for size, rows in errors["sizes left out"].items():
        print(f"fitted without {size}:")
        for name, row in rows.items():
            print(f"  {name:10} median {row['median']:6.1%}   worst {row['worst']:6.1%}")
    wrong = verdicts_of(HopperCosts.of(found), record)
    total = len(record["rows"]) * len(record["modes"])
    print(f"slower than {SLOWER} of bf16, or not: {len(wrong)} of {total} are the other way")
    for scheme, call, predicted, measured in wrong:
        size = f"{call.n} x {call.k}, M = {call.m}"
        print(f"  {scheme:10} {size:24} predicted {predicted:.2f}x, measured {measured:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, default=RECORD, help="recorded times")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {FILE}")
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    found = described(record)
    show(found, record)
    if options.write:
        OUTPUT.write_text(text_of(found), encoding="utf-8")
        print(OUTPUT)


if __name__ == "__main__":
    main()
