"""SmolLM2 in each runtime: load it, read a prompt, then generate token by token.

Everything is imported where it is used, so that the memory of a process is that of its own runtime.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from examples.benchmarks.language_model.problem import Problem

Q4_0: Final = 2
"""``LLAMA_FTYPE_MOSTLY_Q4_0``."""


class Session(Protocol):
    """A loaded model with a cache. Calls begin a text at position 0 or go on with it."""

    def __call__(self, tokens: list[int], position: int) -> int:
        """Read tokens at a position and the ones after it; return the most likely next one."""


@dataclass(frozen=True)
class Runtime:
    """One way to run the model.

    Attributes:
        name: What results call it.
        what: In words.
        libraries: Modules that it runs with; they are loaded before the model.
        compiler: Modules that preparing its file needs.
        prepare: Writes the file that ``load`` reads, in a process of its own; it may be missing.
        load: Returns a session.
    """

    name: str
    what: str
    libraries: tuple[str, ...]
    compiler: tuple[str, ...]
    prepare: Callable[[Problem, Path], None] | None
    load: Callable[[Problem, Path], Session]

    def missing(self, file: Path) -> str:
        """Return the first module that is not installed, or an empty text."""
        needed = self.libraries if file.exists() else (*self.libraries, *self.compiler)
        return next((name for name in needed if importlib.util.find_spec(name) is None), "")


# --- fpcompiler -------------------------------------------------------------------------------


def prepare_compiled(problem: Problem, file: Path) -> None:
    """Compile the model with its cache."""
    import torch

    import fpcompiler
    from examples.zoo import smollm2
    from fpcompiler.huggingface import CachedDecoder

    decoder = CachedDecoder(smollm2.load(), 1, problem.positions, last_logits=1)
    inputs = (torch.arange(8)[None], torch.arange(8))
    fpcompiler.compile(decoder, problem.scheme, example_inputs=inputs).save(file)


def load_compiled(problem: Problem, file: Path) -> Session:
    """Load the artifact."""
    import torch

    import fpcompiler

    torch.set_num_threads(problem.threads)
    model = fpcompiler.load(file, strict=True)

    def session(tokens: list[int], position: int) -> int:
        positions = torch.arange(position, position + len(tokens))
        return int(model(torch.tensor([tokens]), positions)[0, -1].argmax())

    return session


# --- Hugging Face -----------------------------------------------------------------------------


def prepare_bf16(problem: Problem, file: Path) -> None:
    """Write the model in bf16 as a folder of transformers."""
    import torch

    from examples.zoo import smollm2

    smollm2.load().to(torch.bfloat16).save_pretrained(file)


def load_eager(problem: Problem, file: Path) -> Session:
    """Load the model as transformers runs it: bf16, the cache growing with the text."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    torch.set_num_threads(problem.threads)
    model = LlamaForCausalLM.from_pretrained(file, dtype=torch.bfloat16).eval()
    state: dict[str, Any] = {}

    @torch.no_grad()
    def session(tokens: list[int], position: int) -> int:
        if position == 0:
            state["cache"] = DynamicCache(config=model.config)
        out = model(torch.tensor([tokens]), past_key_values=state["cache"], logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return session


def load_torch_compile(problem: Problem, file: Path) -> Session:
    """Load the model for torch.compile: bf16, a cache of a fixed size."""
    import torch
    from transformers import LlamaForCausalLM, StaticCache

    torch.set_num_threads(problem.threads)
    model = LlamaForCausalLM.from_pretrained(file, dtype=torch.bfloat16).eval()
    cache = StaticCache(config=model.config, max_cache_len=problem.positions)
    compiled = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def session(tokens: list[int], position: int) -> int:
        if position == 0:
            cache.reset()
        positions = torch.arange(position, position + len(tokens))
        out = compiled(
            input_ids=torch.tensor([tokens]), position_ids=positions[None],
            past_key_values=cache, logits_to_keep=1,
        )  # fmt: skip
        return int(out.logits[0, -1].argmax())

    return session


# --- llama.cpp --------------------------------------------------------------------------------


def prepare_q4_0(problem: Problem, file: Path) -> None:
    """Quantize the file of the model (Q4_1, an embedding of 8 bits) to Q4_0."""
    import llama_cpp

    from examples.zoo import packages

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = Q4_0, True, problem.threads
    source = str(packages.SMOLLM2.path()).encode()
    if llama_cpp.llama_model_quantize(source, str(file).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp could not quantize {source.decode()}")


def load_llama_cpp(problem: Problem, file: Path) -> Session:
    """Load the file with llama.cpp; calls go to its C interface without the Python class."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        str(file), n_ctx=problem.positions, n_batch=problem.prompt, n_ubatch=problem.prompt,
        n_threads=problem.threads, n_threads_batch=problem.threads, verbose=False,
    )  # fmt: skip
    memory = llama_cpp.llama_get_memory(llama.ctx)
    words = llama.n_vocab()

    def session(tokens: list[int], position: int) -> int:
        llama_cpp.llama_memory_seq_rm(memory, -1, position, -1)
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(llama.ctx, batch):
            raise SystemExit("llama.cpp could not read the tokens")
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (words,)).argmax())

    return session


_TORCH: Final = ("torch", "transformers")

_ROWS: Final = (
    Runtime(
        "fpcompiler", "this compiler", ("torch", "fpcompiler"), ("torch_mlir", "transformers"),
        prepare_compiled, load_compiled,
    ),
    Runtime("hf-eager-bf16", "transformers, eager, bf16", _TORCH, (), prepare_bf16, load_eager),
    Runtime(
        "torch-compile-bf16", "transformers with torch.compile, bf16", _TORCH, (), prepare_bf16,
        load_torch_compile,
    ),
    Runtime(
        "llama.cpp-q4_0", "llama.cpp, Q4_0, head of 8 bits", ("llama_cpp", "numpy"), (),
        prepare_q4_0, load_llama_cpp,
    ),
)  # fmt: skip

RUNTIMES: Final[Mapping[str, Runtime]] = {row.name: row for row in _ROWS}
"""Every runtime by name."""
