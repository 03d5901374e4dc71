"""The index of kernels in an artifact: what is written is read, and anything else is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.kernels import INDEX, KernelIndex
from fpcompiler.errors import ArtifactError
from tests.kernel_files import kernel_files, kernel_index

LIBRARY = b"\x7fELF"


def test_an_index_is_read_back():
    index = kernel_index(LIBRARY)
    assert KernelIndex.from_json(index.to_json()) == index
    assert KernelIndex.of(kernel_files(LIBRARY)) == index
    assert KernelIndex.of({}) == KernelIndex()
    assert [(t, i.name) for t, i in index.all_instances()] == [("sm_100a", "gemm")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.pop(INDEX), "it has kernels, but no kernels/index.json"),
        (lambda files: files.update({"more.so": b""}), "more.so is not in the index"),
        (lambda files: files.pop("sm_100a.gemm.so"), "gemm.so is named by the index but not there"),
        (lambda files: files.update({"sm_100a.gemm.so": b"x"}), "is not the one of the index"),
    ],
)
def test_files_that_are_not_those_of_the_index(change, words):
    files = kernel_files(LIBRARY)
    change(files)
    with pytest.raises(ArtifactError, match=words):
        KernelIndex.of(files)


def _target(data: dict[str, Any]) -> dict[str, Any]:
    return data["targets"]["sm_100a"]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": lambda d: d.update(version=2),
    "more fields": lambda d: d.update(more=1),
    "targets": lambda d: d.update(targets=[]),
    "field of a target": lambda d: _target(d).pop("toolchain"),
    "capabilities": lambda d: _target(d).update(capabilities=[10]),
    "toolchain": lambda d: _target(d).update(toolchain={"nvcc": 13}),
    "no library": lambda d: _target(d)["instances"]["gemm"].update(files={"log": "a.log"}),
    "another kind of file": lambda d: _target(d)["instances"]["gemm"]["files"].update(python="a"),
    "role": lambda d: _target(d)["instances"]["gemm"].update(role=1),
    "problem": lambda d: _target(d)["instances"]["gemm"].update(problem="gemm"),
    "unknown kernel": lambda d: _target(d)["layers"]["up"]["kernels"].update(decode="other"),
    "reason": lambda d: _target(d)["layers"]["down"].update(reason=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_index_says_is_refused(name):
    data = copy.deepcopy(kernel_index(LIBRARY).to_json())
    CHANGES[name](data)
    files = {**kernel_files(LIBRARY), INDEX: jsonfile.dump(data)}
    with pytest.raises(ArtifactError, match=r"kernels/index.json"):
        KernelIndex.of(files)
