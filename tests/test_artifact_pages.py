"""Pages of an artifact that were read and are not needed are given back."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fpcompiler
from fpcompiler.artifact.pages import Pages
from fpcompiler.artifact.store import read

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Return the bytes of a file that are in the memory of this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose file is large: 4 MB of weights that stay as they are."""
    path = tmp_path_factory.mktemp("pages") / "model.fpc"
    model = nn.Sequential(nn.Embedding(4096, 256), nn.Linear(256, 512)).eval()
    ids = torch.arange(8)[None]
    fpcompiler.compile(model, "w4a6", example_inputs=(ids,)).save(path)
    assert path.stat().st_size > 4 << 20
    return path


def test_reading_a_file_does_not_keep_it_in_memory(saved: Path) -> None:
    artifact = read(saved)
    assert resident(saved) < 1 << 20
    table = next(t for t in artifact.tensors.values() if t.shape == (4096, 256))
    before = table.clone()
    assert resident(saved) > 3 << 20
    artifact.pages.release()
    assert resident(saved) < 1 << 20
    assert torch.equal(table, before)


def test_a_loaded_model_reads_only_what_a_call_needs(saved: Path) -> None:
    model = fpcompiler.load(saved)
    assert resident(saved) < 1 << 20
    assert model(torch.arange(8)[None]).shape == (1, 8, 512)


def test_copies_have_memory_of_their_own(saved: Path) -> None:
    artifact = read(saved)
    copy = pickle.loads(pickle.dumps(artifact))
    for key, tensor in copy.tensors.items():
        assert torch.equal(tensor, artifact.tensors[key])
    copy.pages.release()
    for key, tensor in copy.tensors.items():
        assert torch.equal(tensor, artifact.tensors[key])


def test_only_whole_pages_within_the_bytes_are_given_back(saved: Path) -> None:
    artifact = read(saved)
    table = next(t for t in artifact.tensors.values() if t.shape == (4096, 256))
    total = float(table.sum())
    for start, size in ((0, 0), (1, 10), (4097, 4096), (5, 3 << 20), (3 << 20, 1 << 20)):
        artifact.pages.release(start, size)
    assert float(table.sum()) == total
    Pages().release()
