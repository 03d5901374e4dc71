"""The tables of the README, from the recorded results beside this file.

    python examples/benchmarks/report.py

A test compares what this prints with the README, so that its numbers are those on record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {
    "smollm2": ("SmolLM2-135M, perplexity", "perplexity", ".2f"),
    "minilm": ("MiniLM, cosine", "cosine", ".3f"),
    "dinov2": ("DINOv2 ViT-S, patch cosine", "patch_cosine", ".3f"),
    "whisper": ("Whisper tiny.en, WER", "word_error_rate", ".3f"),
}
"""For each model: heading, metric, how it is written."""
SHORT = {"w=f4E2M1FN@row:f32,a=f4E2M1FN@tensor:f32": "W4 row, A4 tensor"}
"""Schemes without a name, as the table has them."""


def main() -> None:
    """Print the tables."""
    print(accuracy())
    print()
    print(methods())


def accuracy() -> str:
    """Return the table of what each scheme does to each model."""
    reports = {name: _read(f"accuracy-{name}.json") for name in COLUMNS}
    lines = [
        "| scheme | " + " | ".join(heading for heading, _, _ in COLUMNS.values()) + " | x bf16 |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 1),
        "| fp32 | " + " | ".join(_fp32(name, report) for name, report in reports.items()) + " | |",
    ]
    for index, scheme in enumerate(reports["smollm2"]["schemes"]):
        rows = [report["schemes"][index] for report in reports.values()]
        assert {row["name"] for row in rows} == {scheme["name"]}, "the reports differ in schemes"
        cells = [_cell(name, row["metrics"]) for name, row in zip(reports, rows, strict=True)]
        ratio = f"{scheme['quantized_bytes_ratio_to_bf16']:.3f}"
        lines.append(f"| {scheme['name']} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def methods() -> str:
    """Return the table of what the methods of ``compile`` recover."""
    reports = {name: _read(f"methods-{name}.json") for name in COLUMNS if _recorded(name)}
    headings = [COLUMNS[name][0] for name in reports]
    lines = [
        "| scheme | method | " + " | ".join(headings) + " |",
        "| --- | --- |" + " ---: |" * len(headings),
        "| fp32 | | " + " | ".join(_cell(n, r["fp32"]) for n, r in reports.items()) + " |",
    ]
    found = {name: {_key(row): row for row in report["rows"]} for name, report in reports.items()}
    for key in dict.fromkeys(key for rows in found.values() for key in rows):
        scheme, method = key
        cells = [
            _cell(name, rows[key]["metrics"]) if key in rows else "" for name, rows in found.items()
        ]
        lines.append(f"| {SHORT.get(scheme, scheme)} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _recorded(name: str) -> bool:
    return (RESULTS / f"methods-{name}.json").exists()


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["scheme"], row["method"]


def _fp32(name: str, report: dict[str, Any]) -> str:
    return _cell(name, report["fp32"]["metrics"])


def _cell(name: str, metrics: dict[str, float]) -> str:
    _, metric, form = COLUMNS[name]
    value = metrics[metric]
    return f"{value:,.0f}" if value >= 1000 else f"{value:{form}}"


def _read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main()
