"""Kernels of attention as a library for the CPU, where each thread is a coroutine."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fpcompiler.codegen.attention.emit import HEADERS, problem_text
from fpcompiler.runtime.cuda.attention import AttendProblem, Call, _parts, problem_of

_ROOT: Final = Path(__file__).parents[3]
_REPLACED: Final = {
    ("cuda", "instructions.h"): _ROOT / "tests/codegen/cuda/emulation.h",
    ("attention", "warps.h"): _ROOT / "tests/codegen/attention/warps.h",
}


def source(problems: Sequence[AttendProblem]) -> str:
    """Return the kernels with stand-ins for the instructions of a GPU."""
    files = [_REPLACED.get(header, _ROOT / "codegen" / "/".join(header)) for header in HEADERS]
    text = "\n".join(file.read_text("utf-8") for file in files).replace("#pragma once\n", "")
    host = 'extern "C" int32_t fpc_on_host() { return 1; }'
    return f"{text}\n{problem_text(problems)}\n{host}\n"


def build(problems: Sequence[AttendProblem], folder: Path) -> Path:
    """Compile them with g++."""
    file, library = folder / "attend.cpp", folder / "attend.so"
    file.write_text(source(problems))
    flags = ("-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror",
             "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-attributes")  # fmt: skip
    subprocess.run(["g++", *flags, str(file), "-o", str(library)], check=True)
    return library


class Arguments(ctypes.Structure):
    """``FpcAttendArguments``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scales", "v_scales", "mask", "y")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in "qkv"),
        ("mask_strides", ctypes.c_int64 * 4),
        *((f"{name}_scale_strides", ctypes.c_int64 * 3) for name in "kv"),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "groups", "queries", "keys")),
        ("scale", ctypes.c_float), ("causal", ctypes.c_int32), ("sm_count", ctypes.c_int32),
    )  # fmt: skip


class Library:
    """The compiled kernels."""

    def __init__(self, problems: Sequence[AttendProblem], folder: Path) -> None:
        self.problems = list(problems)
        self.run = ctypes.CDLL(str(build(problems, folder))).fpc_attend_run
        self.run.argtypes = (ctypes.c_int32, ctypes.POINTER(Arguments), ctypes.c_void_p)

    def attend(self, call: Call, sms: int = 132) -> Tensor:
        """Return the result [B, H, M, D] of a call that a kernel takes."""
        problem = problem_of(call)
        assert problem is not None
        q, (k, k_scale), (v, v_scale) = call.q, _parts(call.k), _parts(call.v)
        (batch, heads, queries, width), (groups, keys) = q.shape, k.shape[1:3]
        y = torch.full((batch, queries, heads, width), torch.nan, dtype=q.dtype)
        mask = None if call.mask is None else call.mask.expand(batch, heads, queries, keys)
        scale = width**-0.5 if call.scale is None else call.scale
        arguments = Arguments(
            *(None if x is None else x.data_ptr() for x in (q, k, v, k_scale, v_scale, mask, y)),
            *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)),
            (ctypes.c_int64 * 4)(*(mask.stride() if mask is not None else ())),
            *((ctypes.c_int64 * 3)(*(x.stride()[:3] if x is not None else ()))
              for x in (k_scale, v_scale)),
            batch, heads, groups, queries, keys, scale, call.causal, sms,
        )  # fmt: skip
        status = self.run(self.problems.index(problem), arguments, None)
        assert status == 0, status
        return y.transpose(1, 2)
