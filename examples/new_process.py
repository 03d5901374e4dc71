"""Runs artifacts in new processes, which know nothing of the models they were compiled from."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fpcompiler.errors import RunError

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str], text: str = "") -> str:
    """Run Python with the arguments and the input ``text``; return what it printed.

    Raises:
        RunError: If it failed; its own message is on stderr.
    """
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, input=text, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"the new process ended with exit code {done.returncode}; see above.")
    return done.stdout


def call(artifact: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call an artifact with ``fpcompiler run``, and return its results by name."""
    with tempfile.TemporaryDirectory() as folder:
        sent, received = Path(folder) / "inputs.safetensors", Path(folder) / "outputs.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, sent)
        files = ["--inputs", str(sent), "--output", str(received)]
        run(["-m", "fpcompiler", "run", str(artifact.absolute()), *files])
        return load_file(received)
