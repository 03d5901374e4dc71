"""Which libraries of an artifact are loaded, and from where."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fpcompiler.artifact.kernels import Instance
from fpcompiler.errors import ArtifactError, DependencyError, OptionError
from fpcompiler.options import Options
from fpcompiler.runtime.trust import Gatekeeper

LIBRARY = b"\x7fELF a library"
BUILT = b"\x7fELF what this machine builds"


def instance_of(data: bytes, role: str = "gemm") -> Instance:
    sha256 = hashlib.sha256(data).hexdigest()
    return Instance("gemm_0", role, {"arch": "sm_90a"}, {"library": "gemm.so"}, sha256)


class Builder:
    """A compiler that always builds the same; it counts how often."""

    def __init__(self, data: bytes = BUILT) -> None:
        self.data, self.built = data, 0

    def __call__(self, instance: Instance, options: Options) -> Path:
        self.built += 1
        return put(options, self.data)


def put(options: Options, data: bytes, recorded: bytes | None = None) -> Path:
    """Put a library into the folder of compiled kernels."""
    sha256 = hashlib.sha256(data if recorded is None else recorded).hexdigest()
    folder = options.cache / "kernels" / sha256[:32]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.so").write_bytes(data)
    (folder / "metadata.json").write_text(json.dumps({"sha256": sha256}))
    return folder / "kernel.so"


def refuse(instance: Instance, options: Options) -> Path:
    raise DependencyError("There is no nvcc.")


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(cache=tmp_path / "cache")


def test_trusted_libraries_are_copied_to_a_private_folder(options: Options) -> None:
    path = Gatekeeper(options, trust=True, rebuild=refuse).admit(instance_of(LIBRARY), LIBRARY)
    assert path.read_bytes() == LIBRARY
    assert path.name == f"{hashlib.sha256(LIBRARY).hexdigest()}.so"
    assert path.parent == options.cache / "loaded"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    stamp = path.stat().st_mtime_ns
    again = Gatekeeper(options, trust=True).admit(instance_of(LIBRARY), LIBRARY)
    assert again == path
    assert path.stat().st_mtime_ns == stamp
    assert list(path.parent.iterdir()) == [path]


def test_what_was_built_here_is_loaded(options: Options) -> None:
    put(options, LIBRARY)
    gatekeeper = Gatekeeper(options, rebuild=refuse)
    assert gatekeeper.admit(instance_of(LIBRARY), LIBRARY).read_bytes() == LIBRARY


def test_an_unknown_hash_is_built_again(options: Options, caplog: pytest.LogCaptureFixture) -> None:
    builder = Builder()
    put(options, b"another one")
    with caplog.at_level(logging.WARNING, "fpcompiler.runtime"):
        path = Gatekeeper(options, rebuild=builder).admit(instance_of(LIBRARY), LIBRARY)
    assert path.read_bytes() == BUILT
    assert builder.built == 1
    assert "compiled elsewhere and is not trusted" in caplog.text
    assert "differs from the one built here" in caplog.text


@pytest.mark.parametrize(
    ("role", "problem", "says"),
    [
        ("gemm", {"kind": "nvf4"}, "this says nothing"),
        ("gemm", {"mode": "i8"}, "otherwise distrust the artifact"),
        ("quantize", {}, "otherwise distrust the artifact"),
    ],
)
def test_other_bytes_mean_something_where_builds_are_reproducible(
    role: str, problem: dict[str, str], says: str, options: Options, caplog
) -> None:
    instance = replace(instance_of(LIBRARY, role), problem=problem)
    Gatekeeper(options, rebuild=Builder()).admit(instance, LIBRARY)
    assert says in caplog.text


def test_the_same_bytes_are_no_reason_for_distrust(
    options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    path = Gatekeeper(options, rebuild=Builder(LIBRARY)).admit(instance_of(LIBRARY), LIBRARY)
    assert path.read_bytes() == LIBRARY
    assert "differs" not in caplog.text


def test_one_changed_byte_is_not_loaded(options: Options) -> None:
    put(options, LIBRARY)
    changed = LIBRARY[:-1] + b"!"
    for trust in (False, True):
        with pytest.raises(ArtifactError, match="is not the one that its index names"):
            Gatekeeper(options, trust, Builder()).admit(instance_of(LIBRARY), changed)
    # With an index that fits, it is a library like any other that was not built here.
    path = Gatekeeper(options, rebuild=Builder()).admit(instance_of(changed), changed)
    assert path.read_bytes() == BUILT


def test_a_record_alone_proves_nothing(options: Options) -> None:
    put(options, b"damaged", recorded=LIBRARY)
    builder = Builder()
    Gatekeeper(options, rebuild=builder).admit(instance_of(LIBRARY), LIBRARY)
    assert builder.built == 1
    (options.cache / "kernels" / "x").mkdir()
    (options.cache / "kernels" / "x" / "kernel.so").write_bytes(LIBRARY)
    (options.cache / "kernels" / "x" / "metadata.json").write_text("{")
    assert not Gatekeeper(options).was_built_here(instance_of(LIBRARY).sha256)


def test_without_a_compiler_the_error_says_what_to_do(options: Options) -> None:
    with pytest.raises(ArtifactError) as caught:
        Gatekeeper(options, rebuild=refuse).admit(instance_of(LIBRARY), LIBRARY)
    assert str(caught.value) == (
        "the kernels gemm_0 in this artifact are code of whoever wrote the file. They were not "
        "built on this machine, and cannot be built again here: There is no nvcc. Load the model "
        "with trust=True if you trust its origin, or with kernels=False to run it without them."
    )


def test_descriptions_of_others_are_checked_before_anything_is_generated(options: Options) -> None:
    for role, problem in (
        ("gemm", {"arch": "sm_90a", "name": '"); system("true'}),
        ("quantize", {"arch": "sm_90a", "problems": [{"operand": "f6E2M3FN"}]}),
        ("quantize", {"arch": "x", "problems": []}),
        ("shell", {}),
    ):
        instance = replace(instance_of(LIBRARY, role), problem=problem)
        with pytest.raises(ArtifactError, match="cannot be built again here"):
            Gatekeeper(options).admit(instance, LIBRARY)
    assert not (options.cache / "kernels").exists()


@pytest.mark.parametrize("name", ["loaded", "kernels", ".", ".."])
def test_folders_that_others_write_to_are_refused(options: Options, name: str) -> None:
    put(options, LIBRARY)
    (options.cache / "loaded").mkdir(mode=0o700)
    folder = (options.cache / name).resolve()
    mode = folder.stat().st_mode
    folder.chmod(0o777)
    try:
        with pytest.raises(OptionError, match=f"others can write to {folder}. Take that"):
            Gatekeeper(options).admit(instance_of(LIBRARY), LIBRARY)
    finally:
        folder.chmod(mode)


def test_a_folder_for_the_group_is_refused_and_a_sticky_one_above_is_not(options: Options) -> None:
    options.cache.mkdir()
    (options.cache / "loaded").mkdir()
    (options.cache / "loaded").chmod(0o770)
    gatekeeper = Gatekeeper(options, trust=True)
    with pytest.raises(OptionError, match="chmod go-w"):
        gatekeeper.admit(instance_of(LIBRARY), LIBRARY)
    (options.cache / "loaded").chmod(0o700)
    options.cache.chmod(0o1777)  # as /tmp
    assert gatekeeper.admit(instance_of(LIBRARY), LIBRARY).is_file()


def test_a_copy_that_was_changed_is_written_again(options: Options) -> None:
    gatekeeper = Gatekeeper(options, trust=True)
    path = gatekeeper.admit(instance_of(LIBRARY), LIBRARY)
    path.write_bytes(b"something else")
    assert gatekeeper.admit(instance_of(LIBRARY), LIBRARY).read_bytes() == LIBRARY


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    gatekeeper = Gatekeeper(Options(cache=tmp_path / "file"), trust=True)
    with pytest.raises(OptionError, match="Point FPC_CACHE to a folder"):
        gatekeeper.admit(instance_of(LIBRARY), LIBRARY)
