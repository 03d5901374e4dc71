"""The kernels of attention on a GPU: the same tests as on the CPU, and sizes of real models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fpcompiler.codegen.attention.emit import attend_kernels
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.torch_operators import build_operators
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.attention import (
    AttendKernels,
    AttendProblem,
    CachedRows,
    Call,
    CudaAttention,
)
from fpcompiler.runtime.cuda.operators import load_operators
from tests.codegen.attention import test_attend_emulated as emulated
from tests.codegen.attention.test_attend_emulated import CACHED, PROBLEMS, cached, check, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
]

globals().update({name: test for name, test in vars(emulated).items() if name.startswith("test_")})


def refused(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("no kernel took the call")


class GpuLibrary:
    """The compiled kernels; stands for ``emulated.Library``."""

    def __init__(self) -> None:
        options = Options.from_env()
        load_operators(build_operators(options))
        source = attend_kernels([*PROBLEMS, *CACHED], "sm_90a")
        path = KernelCache.from_options(options).build(source).path
        self.kernels = AttendKernels.of([path])

    def attend(self, call: Call, sms: int = 132) -> Tensor:
        """Return the result, brought back from the GPU."""
        q, k, v = moved(call.q), moved(call.k), moved(call.v)
        function = CudaAttention(self.kernels, sms, refused)
        return function(
            q, k, v, moved(call.mask), call.dropout, call.causal, scale=call.scale,
            enable_gqa=call.grouped,
        ).cpu()  # fmt: skip


def moved(x: Any) -> Any:
    """Return it on the GPU, with all that lies between its elements there too."""
    if isinstance(x, CachedRows):
        return x._replace(codes=moved(x.codes), scale=moved(x.scale))
    if x is None:
        return None
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture(scope="module")
def library() -> GpuLibrary:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    return GpuLibrary()


@pytest.mark.parametrize("problem", [*PROBLEMS, *CACHED], ids=str)
@pytest.mark.parametrize("seen", [1, 700, 2048, 4000])
@pytest.mark.parametrize("batch", [1, 16])
def test_a_cache_of_llama(
    library: GpuLibrary, problem: AttendProblem, seen: int, batch: int
) -> None:
    sizes = batch, 32, 8, 1, 4096
    call = cached(problem, *sizes) if problem.cache else Call(*tensors(problem, *sizes))
    mask = (torch.arange(4096) < seen).expand(1, 1, 1, 4096)
    call = replace(call, mask=mask, grouped=True)
    found = check(library, call)  # type: ignore[arg-type]
    assert torch.equal(found, library.attend(call))
