"""Compiled GEMMs, asked on a machine without a GPU: one of each kind of target.

They stay in the user's cache of kernels, so that only the first run compiles.
"""

import itertools
import re
from collections.abc import Callable
from importlib import resources

import pytest

from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass import GemmLibrary, emit, parse_instance
from fpcompiler.codegen.cutlass.library import GEMM_ABI
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.problem import K_PADDING, Activation, Epilogue, GemmProblem, Rows
from fpcompiler.errors import TargetError
from fpcompiler.options import Options
from tests.codegen.problems import E3M0, MXFP4, NVFP4, W4A6, W4A6_ROW, W4A8, instance_of, problem

DATA_CENTRE = problem(W4A6, "sm_100a", Rows.DECODE)
RTX = problem(NVFP4, "sm_120a")
BOTH = pytest.mark.parametrize("layer", [DATA_CENTRE, RTX], ids=["sm_100a", "sm_120a"])

# What one thread block may have, less 1 KB that the driver keeps (CUDA C++ Programming Guide).
SHARED_MEMORY = {90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

Built = Callable[[GemmProblem], BuiltKernel]


@pytest.fixture(scope="module")
def built() -> Built:
    cache = KernelCache.from_options(Options.from_env())
    return lambda layer: cache.build(emit(instance_of(layer)))


def scale_index(row: int, column: int, columns: int) -> int:
    """Return the place of a block scale: 128 rows by 4 columns are 512 bytes, K-atoms first.

    PTX ISA, "Scale factor layout"; the same as torch's SWIZZLE_32_4_4.
    """
    atom = row // 128 * -(-columns // 4) + column // 4
    return atom * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


@pytest.mark.nvcc
@BOTH
def test_padded_sizes_are_computed_and_others_refused(built, layer) -> None:
    library = GemmLibrary(built(layer).path)
    for m, n, k in itertools.product((1, 16, 77, 129), (8, 80, 4096), (K_PADDING, 5 * K_PADDING)):
        assert library.can_implement(m, n, k)
    assert not library.can_implement(128, 77, 128)
    assert not library.can_implement(128, 128, 130)


@pytest.mark.nvcc
@BOTH
def test_it_fits_the_hardware(built, layer) -> None:
    kernel = built(layer)
    library = GemmLibrary(kernel.path)
    assert 0 < library.shared_memory <= SHARED_MEMORY[layer.machine.collectives]
    assert library.workspace(4096, 4096, 4096, 148) >= 0
    check_resources(kernel)


def check_resources(kernel: BuiltKernel) -> None:
    (function,) = kernel.metadata["resources"]
    assert function["arch"] == kernel.metadata["arch"]
    assert (function["stack"], function["stores"], function["loads"]) == (0, 0, 0)
    assert 0 < function["registers"] <= 255


@pytest.mark.nvcc
@BOTH
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 128), (77, 136, 384), (300, 512, 640)])
def test_scales_lie_where_the_formula_says(built, layer, m, n, k) -> None:
    library, block = GemmLibrary(built(layer).path), layer.scale.block
    columns = k // block
    bytes_of = [-(-rows // 128) * 128 * -(-columns // 4) * 4 for rows in (m, n)]
    assert library.scale_bytes(m, n, k) == tuple(bytes_of)
    for column in range(columns):
        # Any value of a block has the scale of the block.
        i = column * block + column % block
        for row in range(0, m, 13):
            assert library.scale_index_a(m, n, k, row, i) == scale_index(row, column, columns)
        for row in range(0, n, 13):
            assert library.scale_index_b(m, n, k, row, i) == scale_index(row, column, columns)


@pytest.mark.nvcc
@BOTH
def test_it_knows_what_it_is(built, layer) -> None:
    kernel = built(layer)
    found = GemmLibrary(kernel.path).description
    assert parse_instance(found) == instance_of(layer)
    assert found == kernel.metadata["description"]


def test_another_file_is_refused(tmp_path) -> None:
    file = tmp_path / "kernel.so"
    file.write_bytes(b"not a library")
    with pytest.raises(TargetError, match=r"kernel\.so is no GEMM of fpcompiler"):
        GemmLibrary(file)


def test_another_library_is_refused() -> None:
    with pytest.raises(TargetError, match=r"libc\.so\.6 is no GEMM of fpcompiler: .*fpc_gemm_abi"):
        GemmLibrary("libc.so.6")


GELU_RESIDUAL = Epilogue(bias=True, activation=Activation.GELU, residual=True)


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        problem(W4A6_ROW, "sm_90a", Rows.DECODE),
        problem(W4A6_ROW, "sm_90a"),
        problem(NVFP4, "sm_100a"),
        problem(MXFP4, "sm_100a", Rows.DECODE),
        problem(W4A6, "sm_100a", epilogue=GELU_RESIDUAL),
        problem(W4A8, "sm_100f", Rows.DECODE),
        problem(E3M0, "sm_100a", Rows.DECODE),
        problem(W4A6_ROW, "sm_100a"),
        problem(NVFP4, "sm_103a"),
        problem(MXFP4, "sm_120a"),
        problem(W4A6, "sm_120f", epilogue=GELU_RESIDUAL),
        problem(E3M0, "sm_120a"),
        problem(W4A6_ROW, "sm_120a"),
        problem(NVFP4, "sm_121a"),
    ],
    ids=lambda layer: instance_of(layer).name,
)
def test_every_family_compiles_without_spills(built, layer) -> None:
    kernel = built(layer)
    library = GemmLibrary(kernel.path)
    assert library.can_implement(77, layer.padded_n, layer.padded_k)
    assert 0 < library.shared_memory <= SHARED_MEMORY[layer.machine.collectives]
    check_resources(kernel)


def test_the_header_and_the_loader_agree_on_the_version() -> None:
    header = resources.files("fpcompiler.codegen.cutlass") / "templates" / "kernel_abi.h"
    found = re.search(r"#define FPC_GEMM_ABI (\d+)", header.read_text(encoding="utf-8"))
    assert found is not None
    assert int(found[1]) == GEMM_ABI
