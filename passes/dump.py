"""Dumps: what every pass did, as files that a person reads and ``fpcompiler opt`` runs again."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpcompiler.errors import OptionError
from fpcompiler.ir.printer import print_program
from fpcompiler.ir.program import Program
from fpcompiler.passes.base import Pass, pass_text
from fpcompiler.passes.manager import PassResult
from fpcompiler.passes.numerics import Probe
from fpcompiler.passes.pipeline import Pipeline, pipeline_text


class Dumper:
    """Writes a folder of dumps while a pipeline runs.

    ===========================  ===================================================================
    ``00-captured.mlir``         the program before the first pass
    ``03-insert-quantize.mlir``  the program after the third pass, if the pass changed something
    ``03-insert-quantize.diff``  what it changed
    ``05-mixed-formats.md``      what a pass reported, if it did
    ``numerics.json``            output and per-layer SQNR after each such pass, on the probe batch
    ``timing.json``              seconds and statistics of every pass
    ``pipeline.txt``             the pipeline, as ``fpcompiler opt -p`` reads it
    ``05-lower-gemm.failed.mlir``  the input of a pass that failed
    ``00-captured.safetensors``  the values of the globals, if they are wanted; for a later pass
                                 only those that it made
    ===========================  ===================================================================

    Args:
        folder: Made if it is not there; dumps of before are deleted.
        program: The program before the first pass.
        pipeline: What will run.
        probe: Measures numerics, if there is one.
        weights: Whether values are written as well, so that any pass can run again on any dump.
            They take as much as the model and the artifact together.
    """

    def __init__(
        self,
        folder: Path,
        program: Program,
        pipeline: Pipeline,
        probe: Probe | None = None,
        *,
        weights: bool = False,
    ) -> None:
        self.folder = folder
        self.probe = probe
        self._written: set[str] | None = set() if weights else None
        self._number = 0
        self._text = print_program(program)
        self._results: list[PassResult] = []
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for kind in ("mlir", "diff", "md", "safetensors"):
                for old in folder.glob(f"[0-9][0-9]-*.{kind}"):
                    old.unlink()
        self._write("pipeline.txt", pipeline_text(pipeline) + "\n")
        self._last = self._dump(program.stage.label, self._text, "")
        self._dump_weights(program)

    def before(self, program: Program, item: Pass) -> None:
        """Count the pass."""
        self._number += 1

    def after(self, program: Program, item: Pass, result: PassResult) -> None:
        """Write the program if the pass changed it."""
        self._results.append(result)
        self._write_timing()
        if result.report:
            self._write(f"{self._number:02}-{item.name}.md", result.report)
        text = print_program(program)
        if text == self._text:
            return
        diff = difflib.unified_diff(
            self._text.splitlines(keepends=True),
            text.splitlines(keepends=True),
            self._last,
            f"{self._number:02}-{item.name}.mlir",
            n=1,
        )
        self._write(f"{self._number:02}-{item.name}.diff", "".join(diff))
        self._last = self._dump(item.name, text, pass_text(item))
        self._dump_weights(program)
        self._text = text
        if self.probe:
            self.probe.measure(program, f"{self._number:02}-{item.name}")
            self._write("numerics.json", json.dumps(self.probe.to_json(), indent=1) + "\n")

    def failed(self, program: Program, item: Pass, error: BaseException) -> None:
        """Write what the failing pass was given, and name the file in the error."""
        name = f"{self._number:02}-{item.name}.failed.mlir"
        self._write(name, self._header(pass_text(item)) + self._text)
        path, text = shlex.quote(str(self.folder / name)), shlex.quote(pass_text(item))
        error.add_note(f"its input is kept; to run it again: fpcompiler opt {path} -p {text}")

    def _dump(self, name: str, text: str, item: str) -> str:
        file = f"{self._number:02}-{name}.mlir"
        self._write(file, self._header(item) + text)
        return file

    def _dump_weights(self, program: Program) -> None:
        """Write the globals that no dump has yet; their values do not change."""
        if self._written is None:
            return
        # Cloned: tied weights share memory, which the format has no way to say.
        new = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in program.weights.items()
            if name not in self._written
        }
        self._written |= set(new)
        if new:
            with _writable(self.folder):
                save_file(new, self.folder / Path(self._last).with_suffix(".safetensors"))

    def _header(self, item: str) -> str:
        """Return comment lines that tell how the text was made from the dump before it."""
        return f"// fpcompiler opt {self._last} -p {shlex.quote(item)}\n" if item else ""

    def _write_timing(self) -> None:
        rows = [
            {
                "pass": result.text,
                "seconds": round(result.seconds, 4),
                "verify_seconds": round(result.verify_seconds, 4),
                "statistics": dict(result.statistics),
            }
            for result in self._results
        ]
        self._write("timing.json", json.dumps(rows, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        with _writable(self.folder):
            (self.folder / name).write_text(text, encoding="utf-8")


def weights_beside(dump: Path) -> dict[str, Tensor]:
    """Return the values that the dumps of a folder hold for one of them; empty without values.

    Args:
        dump: A dumped ``.mlir`` file, whose name begins with its number.
    """
    values: dict[str, Tensor] = {}
    for file in sorted(dump.parent.glob("[0-9][0-9]-*.safetensors")):
        if file.name[:2] <= dump.name[:2]:
            values |= load_file(file)
    return values


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error of ours."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"the dumps cannot be written to {folder}: {error.strerror}. Choose a folder that is "
            "writable and has room (dump_dir, or FPC_DUMP)."
        ) from error
