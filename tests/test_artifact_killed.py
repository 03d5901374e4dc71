"""A process that is killed, or fails, while it saves or loads leaves nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import fpcompiler
from fpcompiler.artifact import read, save
from fpcompiler.artifact.container import ALIGNMENT
from fpcompiler.errors import FpcompilerError
from tests.forks import exit_code
from tests.plans import Mlp, mlp_artifact, with_golden

ARTIFACT = with_golden(mlp_artifact(Mlp(32, 32)), torch.linspace(-1, 1, 64).view(2, 32))
SOURCE = str(Path(fpcompiler.__file__).parent)
POINTS = 15


class Killed:
    """Counts the lines of fpcompiler that run, and kills its process at one of them."""

    def __init__(self, line: int | None = None) -> None:
        self.count = 0
        self.line = line

    def __call__(self, frame: FrameType, event: str, argument: object) -> Killed | None:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self

    def during(self, work: Callable[[], object]) -> int:
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(None)
        return self.count


def lines_of(work: Callable[[], object]) -> list[int]:
    """Return lines of the work to kill it at: the first and the last ones, and some in between."""
    work()  # What is kept from a first time runs no more.
    total = Killed().during(work)
    return sorted({*range(1, total, total // POINTS), *range(total - 20, total + 1)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which everything is that a program could leave something in."""
    for name in ("files", "temporary", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def has_unnamed_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        return False
    return True


def test_a_killed_save_of_a_new_file_leaves_all_of_it_or_nothing(folder: Path) -> None:
    if not has_unnamed_files(folder):
        pytest.skip("this system has no files without names")
    save(folder / "whole.fpc", ARTIFACT)
    whole = (folder / "whole.fpc").read_bytes()
    (folder / "whole.fpc").unlink()
    path = folder / "files" / "model.fpc"

    def work() -> None:
        path.unlink(missing_ok=True)
        save(path, ARTIFACT)

    seen = set()
    for line in lines_of(work):
        path.unlink()
        assert exit_code(lambda line=line: Killed(line).during(work)) == -signal.SIGKILL
        left = contents(folder)
        assert left in ({}, {"files/model.fpc": whole})
        seen.add(len(left))
        path.touch()
    assert seen == {0, 1}, "it was killed before and after it had its name"


def test_a_killed_save_keeps_the_old_file(folder: Path) -> None:
    if not has_unnamed_files(folder):
        pytest.skip("this system has no files without names")
    path = folder / "model.fpc"
    save(path, ARTIFACT)
    new = path.read_bytes()
    old = b"old" * ALIGNMENT

    def work() -> None:
        save(path, ARTIFACT)

    seen = set()
    for line in lines_of(work):
        path.write_bytes(old)
        assert exit_code(lambda line=line: Killed(line).during(work)) == -signal.SIGKILL
        left = contents(folder)
        seen.add(left.pop("model.fpc"))
        # Between its two names the new file has a third one, but it is complete then.
        assert {*left.values()} <= {new}
        for name in left:
            (folder / name).unlink()
    assert seen == {old, new}


def test_a_killed_load_leaves_nothing(folder: Path) -> None:
    path = folder / "model.fpc"
    save(path, ARTIFACT)
    before = contents(folder)

    def work() -> None:
        fpcompiler.load(path)

    for line in lines_of(work):
        assert exit_code(lambda line=line: Killed(line).during(work)) == -signal.SIGKILL
        assert contents(folder) == before


def test_a_load_without_memory_leaves_nothing(folder: Path, capfd) -> None:
    path = folder / "model.fpc"
    save(path, with_golden(mlp_artifact(Mlp(2048, 2048)), torch.ones(1, 2048)))
    before = contents(folder)

    def starved(room: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        fpcompiler.load(path)

    size = path.stat().st_size
    codes = [exit_code(lambda room=room: starved(room)) for room in (0, size // 2)]
    assert codes == [1, 1], "it raises, and does not crash"
    assert contents(folder) == before
    assert "memory" in capfd.readouterr().err
    assert exit_code(lambda: fpcompiler.load(path)) == 0


def test_a_damaged_file_stays_as_it_is(folder: Path) -> None:
    path = folder / "model.fpc"
    save(path, ARTIFACT)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :])
    before = contents(folder)
    with pytest.raises(FpcompilerError):
        fpcompiler.load(path)
    assert contents(folder) == before


def test_where_all_files_have_names_saving_works_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    for _ in range(2):
        save(folder / "model.fpc", ARTIFACT)
        assert [*contents(folder)] == ["model.fpc"]
    assert read(folder / "model.fpc").scheme == ARTIFACT.scheme
