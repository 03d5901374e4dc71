"""The tables of the documents, from the recorded results beside this file.

    python examples/benchmarks/report.py [--write]

A test compares what this prints with the README and with README.md here, so that their numbers are
those on record; ``--write`` puts the tables there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.language_model.summary import grown, ratio
from examples.benchmarks.rows import MEASURED, PAPER, SHOWN, TOKEN, Rows

COLUMNS = {
    "smollm2": ("SmolLM2-135M, perplexity", "perplexity", ".2f"),
    "minilm": ("MiniLM, cosine", "cosine", ".3f"),
    "dinov2": ("DINOv2 ViT-S, patch cosine", "patch_cosine", ".3f"),
    "whisper": ("Whisper tiny.en, WER", "word_error_rate", ".3f"),
}
"""For each model: heading, metric, how it is written."""
SHORT = {PAPER: "4/4/4", TOKEN: "w4a6, token scales"}
"""Schemes without a name, as the table has them."""


ONNX_COLUMNS = {
    "smollm2": ("SmolLM2-135M, perplexity", "perplexity", ".3f"),
    "minilm": ("MiniLM, cosine", "cosine", ".4f"),
    "dinov2": ("DINOv2 ViT-S, patch cosine", "patch_cosine", ".4f"),
    "whisper": ("Whisper tiny.en encoder, cosine", "state_cosine", ".4f"),
}
ONNX_WAYS = ("reference", "native", "onnxruntime")
"""Ways to run a program, as the record has them."""

LAYER_ROWS, LAYER_THREADS = (1, 16, 512), 2
"""What the table of layers shows of the record."""

DECODED = ("llama-3-8b-b1", "llama-3-8b-b16")
DECODERS = {
    "fpcompiler-rest": "fpcompiler, `compile_rest()`",
    "fpcompiler": "fpcompiler",
    "torch-compile-bf16": "torch.compile, bf16",
    "hf-eager-bf16": "transformers, bf16",
}
"""Records of generating on a GPU, and the runtimes that the table shows."""

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCUMENTS = dict.fromkeys(
    ("all", "dit", "layers", "bars", "kernels", "builds", "proofs", "hopper"),
    HERE / "README.md",
)
"""Where tables are that are not in the README of the project."""


def main() -> None:
    """Print the tables, or write them into the documents."""
    write = "--write" in sys.argv[1:]
    for name, table in tables().items():
        if write:
            path = document(name)
            path.write_text(replaced(path.read_text(encoding="utf-8"), name, table), "utf-8")
        else:
            print(table, end="\n\n")


def document(name: str) -> Path:
    """Return the document with a table."""
    return DOCUMENTS.get(name, HERE.parents[1] / "README.md")


def replaced(text: str, name: str, table: str) -> str:
    """Return a document with another table between ``<!-- name: ... -->`` and ``<!-- end -->``."""
    before, mark, after = text.partition(f"<!-- {name}:")
    if not mark:
        raise ValueError(f"no document has a place <!-- {name}: ... --> for the table {name}")
    comment, _, rest = after.partition("-->")
    return (
        f"{before}{mark}{comment}-->\n\n{table}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    )


def tables() -> dict[str, str]:
    """Return all tables by name."""
    return {
        "accuracy": accuracy(),
        "methods": methods(SHOWN),
        "paper": methods({PAPER: MEASURED[PAPER]}),
        "all": methods(MEASURED),
        "dit": dit(),
        "llm": llm(),
        "layers": layers(),
        "bars": bars(),
        "kernels": kernels(),
        "builds": builds(),
        "hopper": hopper(),
        "decode": decode(),
        "proofs": proofs(),
        "onnx": onnx(),
        "aoti": aoti(),
    }


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


def methods(rows: Rows) -> str:
    """Return a table of what the methods of ``compile`` recover, for some of what is measured."""
    reports = {name: _read(f"methods-{name}.json") for name in COLUMNS}
    headings = [heading for heading, _, _ in COLUMNS.values()]
    lines = [
        "| scheme | method | " + " | ".join(headings) + " | x bf16 |",
        "| --- | --- |" + " ---: |" * (len(headings) + 1),
        "| fp32 | | " + " | ".join(_cell(n, r["fp32"]) for n, r in reports.items()) + " | |",
    ]
    found = {name: {_key(row): row for row in report["rows"]} for name, report in reports.items()}
    for scheme, names in rows.items():
        for method in names:
            measured = [(name, own.get((scheme, method))) for name, own in found.items()]
            cells = [_cell(name, row["metrics"]) if row else "" for name, row in measured]
            ratio = found["smollm2"].get((scheme, method))
            cells.append(f"{ratio['quantized_bytes_ratio_to_bf16']:.3f}" if ratio else "")
            lines.append(f"| {SHORT.get(scheme, scheme)} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dit() -> str:
    """Return the table of the trained DiT: few pictures of all rows, many of some."""
    few, many = _read("dit-few.json"), _read("dit.json")
    found = {_key(row): row for row in many["rows"]}
    counts = [report["protocol"]["samples"] for report in (few, many)]
    lines = [
        "| scheme | method | error of blocks | "
        + " | ".join(f"PSNR, {count:,} pictures" for count in counts)
        + " | Frechet to fp32 | Frechet to real | class accuracy | x bf16 |",
        "| --- | --- |" + " ---: |" * 7,
        f"| fp32 | | | | {_dit_cells(many['fp32'])} | |",
    ]
    for row in few["rows"]:
        more = _dit_cells(found.get(_key(row), {}))
        cells = [_blocks(row), f"{row['metrics']['psnr_db']:.2f}", more]
        ratio = f"{row['quantized_bytes_ratio_to_bf16']:.3f}"
        lines.append(f"| {row['scheme']} | {row['method']} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def llm() -> str:
    """Return the table of a language model on the CPU, relative to transformers in bf16."""
    report, base = _read("llm.json"), "hf-eager-bf16"
    problem = report["problem"]
    where = f"{report['device']}, {problem['threads']} threads"
    what = f"prompt of {problem['prompt']} tokens | {problem['tokens']} tokens generated"
    lines = [
        f"| {where} | {what} | memory of the model |",
        "| --- |" + " ---: |" * 3,
    ]
    for name in report["memory"]:
        speeds = [ratio(report, base, name, key) for key in ("prompt_seconds", "token_seconds")]
        share = grown(report, name) / grown(report, base)
        cells = [f"{speed:.2f}x" for speed in speeds if speed is not None]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{share:.2f}x"]) + " |")
    return "\n".join(lines)


def kernels() -> str:
    """Return how many layers of each model have a GPU kernel, and how many kernels that takes."""
    models = _read("gpu_kernels.json")["models"]
    headers = [f"{name}, {model['gemms']} layers" for name, model in models.items()]
    lines = [
        "| " + " | ".join(["target", "scheme", *headers]) + " |",
        "| --- | --- |" + " ---: |" * len(models),
    ]
    for case in next(iter(models.values()))["cases"]:
        target, _, scheme = case.partition(" ")
        found = [model["cases"][case] for model in models.values()]
        cells = [
            f"{c['with_kernels']} ({len(c['kernels'])})" if c["kernels"] else "0" for c in found
        ]
        lines.append("| " + " | ".join([target, f"`{scheme}`", *cells]) + " |")
    return "\n".join(lines)


def hopper() -> str:
    """Return the speeds of layers on a Hopper GPU, relative to cuBLAS in bf16."""
    record = _read("hopper_layers.json")
    rows, schemes = record["rows"], [*record["modes"]]
    lines = [
        "| N x K | M | bf16, us | " + " | ".join(f"`{name}`" for name in schemes) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(schemes),
    ]
    for row in rows:
        taken = row["seconds"]
        cells = [f"{row['n']} x {row['k']}", str(row["m"]), f"{taken['bf16'] * 1e6:.1f}"]
        cells += [f"{taken['bf16'] / taken[name]:.2f}" for name in schemes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode() -> str:
    """Return the speeds of generating text on a GPU, relative to torch.compile."""
    lines = [
        "| texts at once | | ms per token | ms of the prompt | GB of weights and cache |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for name in DECODED:
        record = _read(f"gpu_decode-{name}.json")
        base = record["rows"]["torch-compile-bf16"]
        for runtime, heading in DECODERS.items():
            row = record["rows"][runtime]
            speeds = [base[key] / row[key] for key in ("decode_seconds", "prompt_seconds")]
            size, token = row["allocated_bytes"], row["decode_seconds"] / record["tokens"]
            cells = [
                str(record["batch"]), heading,
                f"{token * 1e3:.2f} ({speeds[0]:.2f}x)",
                f"{row['prompt_seconds'] * 1e3:.1f} ({speeds[1]:.2f}x)",
                f"{size / 1e9:.1f} ({size / base['allocated_bytes']:.2f})",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def builds() -> str:
    """Return what compiling the GPU kernels of models costs."""
    lines = [
        "| model | scheme | target | kernels | cold, min of CPU | peak memory | again |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case, row in _read("gpu_kernels.json")["builds"].items():
        model, scheme, target = case.split()
        cells = [
            model, f"`{scheme}`", target, str(len(row["kernels"])),
            f"{row['cold_cpu_seconds'] / 60:.1f}", f"{row['peak_mb'] / 1000:.1f} GB",
            f"{row['warm_seconds']:.3f} s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def proofs() -> str:
    """Return what was checked of kernels without the GPUs that they are for."""
    rows = _read("prove_kernels.json")["kernels"]
    headers = ["kernel", *rows[0]["levels"], "controls red", "nvcc, s of CPU", "CuTe DSL, s of CPU"]
    lines = [
        "| " + " | ".join(headers) + " |",
        "| --- |" + " ---: |" * (len(headers) - 1),
    ]
    for row in rows:
        cells = [
            row["kernel"].removeprefix("gemm_"),
            *(level.removesuffix(" passed") for level in row["levels"].values()),
            f"{row['controls_noticed']} of {row['controls']}",
            f"{row['nvcc_seconds']:.0f}",
            "" if row["dsl_seconds"] is None else f"{row['dsl_seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layers() -> str:
    """Return the speeds of single layers on the CPU, relative to torch in bf16."""
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in _read("cpu.json")["results"]:
        shown = row["rows"] in LAYER_ROWS and row["threads"] == LAYER_THREADS
        if not shown or "speed_to_torch_bf16" not in row:
            continue
        n, k = row["shape"]
        column = f"{n} x {k}, {row['rows']}"
        columns[column] = None
        star = "*" if row["noisy"] else ""
        found.setdefault(row["peer"], {})[column] = f"{row['speed_to_torch_bf16']:.2f}{star}"
    lines = [
        f"| {LAYER_THREADS} threads; layer, rows | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for peer, cells in found.items():
        lines.append(f"| {peer} | " + " | ".join(cells.get(c, "") for c in columns) + " |")
    return "\n".join(lines)


def bars() -> str:
    """Return the speeds that were wanted of layers on the CPU, and what was measured."""
    lines = [
        "| layer | rows | scheme | against | wanted | measured |",
        "| --- | ---: | --- | --- | ---: | ---: |",
    ]
    for bar in _read("cpu.json")["bars"]:
        layer = " x ".join(map(str, bar["shape"]))
        star = "*" if bar["noisy"] else ""
        cells = [layer, str(bar["rows"]), bar["scheme"], bar["against"], f"{bar['wanted']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {bar['measured']:.2f}{star} |")
    return "\n".join(lines)


def onnx() -> str:
    """Return the table of ONNX files against the artifacts that they were made from."""
    record = _read("interop_onnx.json")
    lines = [
        "| | reference | native | onnxruntime | equal quantizations | equal weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (heading, metric, form) in ONNX_COLUMNS.items():
        for section, scheme in (("models", "w4a6"), ("weight_only", "w4a16")):
            row = record.get(section, {}).get(name)
            if row is None:
                continue
            values = row.get("metrics", row)
            cells = [f"{values[way][metric]:{form}}" for way in ONNX_WAYS]
            cells += _equal_steps(row) if "parts" in row else ["", ""]
            lines.append(f"| {heading}, {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aoti() -> str:
    """Return the table of packages of AOTInductor against the native backend."""
    record = _read("interop_aoti.json")
    where = f"{record['scheme']}, {record['device'].partition(' x ')[2]}"
    lines = [
        f"| {where}, {record['threads']} thread | native | package | size to the artifact's | "
        "time to native | torch.compile in bf16 |",
        "| --- |" + " ---: |" * 5,
    ]
    for name, row in record["models"].items():
        heading, metric, form = ONNX_COLUMNS[name]
        cells = [f"{row['metrics'][way][metric]:{form}}" for way in ("native", "package")]
        cells.append(f"{row['bytes']['package'] / row['bytes']['artifact']:.2f}")
        cells += [f"{row['time_to_native'][way]:.2f}" for way in ("aoti", "torch_compile_bf16")]
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _equal_steps(row: dict[str, Any]) -> list[str]:
    """Return how many quantizations and weights of both files are those of the artifact."""
    files = [part[style] for part in row["parts"].values() for style in ("portable", "standard")]
    pairs = (("steps", "quantizations"), ("weights", "weights"))
    return [
        f"{sum(f[kind]['bit_equal'] for f in files)} of {sum(f[kind][count] for f in files)}"
        for kind, count in pairs
    ]


def _blocks(row: dict[str, Any]) -> str:
    """Return the mean error of the blocks' outputs, relative to round-to-nearest."""
    units = row.get("learning", {}).get("units", {}).values()
    errors = [unit["error_of_rtn"] if unit["kept"] else 1.0 for unit in units]
    return f"{sum(errors) / len(errors):.2f}" if errors else ""


def _dit_cells(row: dict[str, Any]) -> str:
    metrics = row.get("metrics", {})
    forms = {"psnr_db": ".2f", "frechet_to_fp32": ".2f", "frechet_to_real": ".2f"}
    forms["class_accuracy"] = ".3f"
    return " | ".join(f"{metrics[n]:{f}}" if n in metrics else "" for n, f in forms.items())


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
