"""A damaged artifact is refused, or gives exactly the right output; it never crashes or lies."""

import json
import random
import runpy
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from fpcompiler.artifact import save
from fpcompiler.errors import FpcompilerError
from fpcompiler.runtime.loading import load
from tests.mutations import MUTATIONS, fuzz, members, packed
from tests.plans import Mlp, mlp_artifact, with_golden

COUNT = 1000
X = torch.linspace(-2, 2, 3 * 32).reshape(3, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "model.fpc"
    save(path, with_golden(mlp_artifact(Mlp(32, 32)), X))
    return path.read_bytes()


def output(path: Path) -> torch.Tensor:
    return load(path)(X)["logits"]


def test_damaged_artifacts_are_refused_or_right(data, tmp_path):
    original = tmp_path / "original.fpc"
    original.write_bytes(data)
    right = output(original)
    tallies = fuzz(data, lambda path: torch.equal(output(path), right), tmp_path, COUNT)
    assert [failure for tally in tallies.values() for failure in tally.failures] == []
    assert set(tallies) == set(MUTATIONS)
    assert sum(tally.refused + tally.right for tally in tallies.values()) == COUNT
    # Every byte of the file is covered by a checksum or has only one possible value.
    assert {name: tally.right for name, tally in tallies.items() if tally.right} == {}
    assert min(tally.refused for tally in tallies.values()) >= COUNT // len(MUTATIONS)


def resealed(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of the plan or of a tensor header, and make all checksums agree again."""
    rows, _ = members(data)
    name = rng.choice(["plan.json", "weights.safetensors", "golden.safetensors", "manifest.json"])
    body = bytearray(rows[name])
    size = len(body) if name.endswith("json") else 8 + int.from_bytes(body[:8], "little")
    for _ in range(rng.randrange(1, 4)):
        body[rng.randrange(size)] = rng.choice(b'0123456789{}[]",:-.eXlvstu\0\xff')
    rows[name] = bytes(body)
    if name != "manifest.json":
        manifest = json.loads(rows["manifest.json"])
        manifest["members"][name]["sha256"] = sha256(rows[name]).hexdigest()
        rows["manifest.json"] = json.dumps(manifest).encode()
    return packed([*rows.items()], sha256(rows["manifest.json"]).hexdigest().encode())


def test_a_forged_artifact_never_raises_anything_else(data, tmp_path):
    """With the checksums forged as well the output may differ, but nothing may crash."""
    rng = random.Random(0)
    path = tmp_path / "forged.fpc"
    outcomes = {"refused": 0, "ran": 0}
    for _ in range(250):
        path.unlink(missing_ok=True)
        path.write_bytes(resealed(data, rng))
        try:
            model = load(path)
            model.verify()
            model(X)
        except FpcompilerError:
            outcomes["refused"] += 1
        else:
            outcomes["ran"] += 1
    assert outcomes["refused"] >= 150
    assert outcomes["ran"] >= 5


def test_the_script_writes_its_counts(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "fuzz_artifacts.py"
    output = tmp_path / "fuzz.json"
    main = runpy.run_path(str(script))["main"]
    assert main(["--count", "38", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["total"] == {"mutants": 38, "refused": 38, "right": 0, "failures": 0}
    assert set(report["kinds"]) == set(MUTATIONS)
