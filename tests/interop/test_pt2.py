"""Archives of torch.export: read by a process with the runtime only, and called like the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fpcompiler
import fpcompiler.runtime.ops
from fpcompiler.artifact import Artifact
from fpcompiler.errors import ExportError
from fpcompiler.plan import Parameter, Placeholder, Plan, Signature, Step, Symbol
from fpcompiler.runtime.model import CompiledModel
from tests.interop.conftest import example
from tests.models import own_cases

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import torch
import fpcompiler.runtime.ops
module = torch.export.load(sys.argv[1]).module()
for rows in (1, 3, 8):
    x, extra = torch.load(f"{sys.argv[2]}/{rows}.pt")
    torch.save(module(x, extra), f"{sys.argv[2]}/{rows}.out.pt")
parts = ("ir", "passes", "capture", "codegen", "interop", "api")
loaded = [name for name in sys.modules if name.startswith(tuple(f"fpcompiler.{p}" for p in parts))]
loaded += [name for name in ("torch_mlir", "onnx", "transformers") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else 0)
"""


def test_a_new_process_with_the_runtime_only_gives_the_same_bits(compiled, tmp_path) -> None:
    file = tmp_path / "model.pt2"
    written = compiled.export(file, "pt2")
    assert (written.files, written.facts["arguments"]) == ((file,), "x, extra")
    for rows in (1, 3, 8):
        torch.save(example(rows), tmp_path / f"{rows}.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rows in (1, 3, 8):
        expected, found = compiled(*example(rows)), torch.load(tmp_path / f"{rows}.out.pt")
        assert [*found] == ["y", "h"]
        assert torch.equal(found["y"], expected["y"])
        assert torch.equal(found["h"][0], expected["h"][0])


def test_a_residual_is_an_argument_of_its_layer(adding, tmp_path) -> None:
    adding.export(tmp_path / "model.pt2", "pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    x = example(5)[0][:, :64].contiguous()
    assert torch.equal(module(x), adding(x))
    assert not [node for node in module.graph.nodes if node.target is torch.ops.aten.add.Tensor]


def test_weights_are_packed_buffers_under_their_names(compiled, tmp_path) -> None:
    compiled.export(tmp_path / "model.pt2", "pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    codes = program.state_dict["second.weight.codes"]
    assert (codes.dtype, codes.shape) == (torch.uint8, (33, 32))
    assert torch.equal(codes, compiled.artifact.tensors["second.weight.codes"])
    (size,) = program.range_constraints.values()
    assert (size.lower, size.upper > 2**30) == (1, True)


def test_a_cache_is_a_buffer_that_calls_update(tmp_path) -> None:
    model, first, _ = own_cases()["cached"].make()
    compiled = fpcompiler.compile(model, "w4a6", example_inputs=first, target="reference")
    compiled.export(tmp_path / "model.pt2", "pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    compiled.reset()
    for args, _ in [(first, {}), *own_cases()["cached"].other_inputs()]:
        assert torch.equal(module(*args), compiled(*args))


def doubled(size: str, symbols: dict[str, Symbol]) -> CompiledModel:
    """Return a program that doubles an input of a size."""
    leaf = {"t": "leaf"}
    plan = Plan(
        signature=Signature((Parameter("x", leaf),), leaf),
        placeholders=(Placeholder("x", "float32", (size,)),),
        steps=(Step("aten.mul.Tensor", ({"v": "x"}, 2.0), ("y",)),),
        outputs=("y",),
        symbols=symbols,
    )
    return CompiledModel(Artifact(plan, {}))


def test_sizes_keep_what_the_plan_says_of_them(tmp_path) -> None:
    file = tmp_path / "model.pt2"
    doubled("2*n + 1", {"n": Symbol(1, 100)}).export(file, "pt2")
    program = torch.export.load(file)
    ranges = {(int(r.lower), int(r.upper)) for r in program.range_constraints.values()}
    assert (3, 201) in ranges
    assert torch.equal(program.module()(torch.ones(9)), torch.full((9,), 2.0))
    doubled("n", {"n": Symbol(4, 4)}).export(file, "pt2")
    assert torch.export.load(file).module()(torch.ones(4)).tolist() == [2.0] * 4


def test_a_size_that_torch_has_no_words_for_is_refused(tmp_path) -> None:
    model = doubled("s0*s1", {"s0": Symbol(1, None), "s1": Symbol(1, None)})
    with pytest.raises(ExportError, match=r"the input 'x' has the size s0\*s1, and torch"):
        model.export(tmp_path / "m.pt2", "pt2")
    assert not (tmp_path / "m.pt2").exists()


FULL = """
import resource, sys
import fpcompiler
from fpcompiler.errors import ExportError
model = fpcompiler.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    model.export(sys.argv[2], "pt2")
except ExportError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_is_an_error_and_leaves_nothing(compiled, tmp_path) -> None:
    compiled.save(tmp_path / "model.fpc")
    (tmp_path / "out").mkdir()
    arguments = [tmp_path / "model.fpc", tmp_path / "out" / "model.pt2"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "model.pt2 could not be written: File too large" in done.stderr
    assert not [*(tmp_path / "out").iterdir()]
