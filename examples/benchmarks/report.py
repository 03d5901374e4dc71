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


def main() -> None:
    """Print the tables."""
    print(accuracy())


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
