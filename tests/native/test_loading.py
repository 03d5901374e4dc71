"""Loading the native library, and what happens when it cannot be."""

from pathlib import Path

import pytest

from fpcompiler import native
from fpcompiler.errors import OptionError
from fpcompiler.native import loading


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FPC_NATIVE", raising=False)
    monkeypatch.delenv("FPC_NATIVE_LIBRARY", raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    assert "install a C++ compiler" in str(native.load(tmp_path / "libfpc.so"))


def test_a_file_that_is_no_library_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "libfpc.so"
    path.write_bytes(b"not a library")
    assert "does not load" in str(native.load(path))


@pytest.mark.skipif(not native.PATH.exists(), reason="the native library was not built")
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_ABI", 99)
    assert "another version" in str(native.load(native.PATH))


def test_it_is_optional_unless_required(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "PATH", tmp_path / "libfpc.so")
    assert native.library() is None
    native.library.cache_clear()
    monkeypatch.setenv("FPC_NATIVE", "require")
    with pytest.raises(OptionError, match="FPC_NATIVE=require, but the native library was not"):
        native.library()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPC_NATIVE", "0")
    assert native.library() is None


@pytest.mark.skipif(not native.PATH.exists(), reason="the native library was not built")
def test_another_file_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(native.PATH.read_bytes())
    monkeypatch.setenv("FPC_NATIVE_LIBRARY", str(other))
    found = native.library()
    assert found is not None
    assert found.functions._name == str(other)
    assert native.why_missing() is None
    native.library.cache_clear()
    other = tmp_path / "broken.so"
    other.write_bytes(b"not a library")
    monkeypatch.setenv("FPC_NATIVE_LIBRARY", str(other))
    with pytest.raises(OptionError, match="FPC_NATIVE_LIBRARY names a file, but the native"):
        native.library()


def test_why_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FPC_NATIVE", "0")
    assert native.why_missing() == "FPC_NATIVE=0 switches the native library off"
    monkeypatch.delenv("FPC_NATIVE")
    monkeypatch.setattr(loading, "PATH", tmp_path / "libfpc.so")
    assert str(native.why_missing()).startswith("the native library was not built")
