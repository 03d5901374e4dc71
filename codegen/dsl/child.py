"""Compile one block-scaled GEMM for sm_100a with CuTe DSL: a program for a process of its own.

CuTe DSL reads its settings from the environment when it is imported, and its compiler stays in the
process; :mod:`fpcompiler.codegen.dsl.aot` sets the one and ends the other. The only argument is a
request in JSON; what comes out is ``k.o``, ``k.h`` and PTX in its folder, and times in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def _processor_time() -> float:
    """Return the seconds of CPU that this process and those that it waited for have taken."""
    return sum(os.times()[:4])


def main(request: dict[str, Any]) -> dict[str, float]:
    """Compile what a request describes; return seconds of CPU by what took them."""
    started = _processor_time()
    # Not at the top: this file can be read where CuTe DSL is not installed.
    import cutlass
    from cutlass import cute
    from cutlass.cute.nvgpu import OperandMajorMode
    from cutlass.cute.runtime import make_fake_stream, make_ptr
    from cutlass.operators.providers.cutedsl.gemm.implementations import (
        sm100_dense_blockscaled_static_persistent_impl as implementation,
    )

    def null(name: str, alignment: int) -> Any:
        """Return a pointer of a type to nothing: compiling reads no data."""
        space = cute.AddressSpace.gmem
        return make_ptr(getattr(cutlass, name), 0, space, assumed_align=alignment)

    imported = _processor_time()
    cluster_m, cluster_n = request["cluster"]
    kernel = implementation.PersistentDenseBlockScaledGemmKernel(
        request["block"], tuple(request["tile"]), (cluster_m, cluster_n)
    )
    k_major = OperandMajorMode.K
    compiled = cute.compile(
        kernel,
        *(null(name, 16) for name in (request["a"], request["b"])),
        *(null(request["scale"], 32) for _ in range(2)),
        null(request["output"], 16),
        (k_major, k_major, cutlass.tensor_utils.LayoutEnum.ROW_MAJOR),
        (cutlass.Int32(0),) * 4,  # M, N, K and the batch come with the call
        request["sms"] // (cluster_m * cluster_n),
        make_fake_stream(),
        lambda value: value,
    )
    done = _processor_time()
    compiled.export_to_c(file_path=request["folder"], file_name="k", function_prefix="fpc_dsl")
    return {"import_seconds": imported - started, "compile_seconds": done - imported}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
