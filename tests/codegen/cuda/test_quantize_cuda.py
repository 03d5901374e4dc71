"""The kernels that quantize, on a GPU: every byte against numerics, which ran on the CPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest
import torch

from fpcompiler.numerics import quantize
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda import Quantized, QuantizeLibrary, QuantizeProblem
from fpcompiler.runtime.cuda.problem import TYPES
from fpcompiler.runtime.cuda.stored import BF16
from tests.codegen.cuda import checks, problems

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
]

ELEMENTS = ("f4E2M1FN", "f6E2M3FN", "f8E4M3FN")
FORMATS = problems.formats()
SCALES = list(dict.fromkeys(p for type in TYPES for p in problems.all_scales(ELEMENTS, (type,))))
SPECIAL = problems.special()
PRODUCED = [*problems.produced(TYPES), *problems.mixed()]
ROTATED = problems.rotated()
STORED = problems.stored()
STORED_PRODUCED = problems.stored_of_producers()
ALL = list(
    dict.fromkeys([*FORMATS, *SCALES, *SPECIAL, *PRODUCED, *ROTATED, *STORED, *STORED_PRODUCED])
)
UNSCALED = FORMATS[: len(problems.ELEMENTS)]
RUN = checks.Runner("cuda")
Built = list[tuple[QuantizeLibrary, int]]


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    jobs = max(1, min(12, (os.cpu_count() or 1) * 3 // 4))
    return problems.compiled(ALL, tmp_path_factory.mktemp("cuda"), architecture(), jobs=jobs)


@pytest.fixture(scope="module")
def by_software(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("software")
    return problems.compiled(UNSCALED, folder, architecture(), software=True)


def indices(of: Sequence[QuantizeProblem]) -> list[int]:
    return [ALL.index(problem) for problem in of]


def name(index: int) -> str:
    return str(ALL[index])


@pytest.mark.parametrize("index", indices(UNSCALED), ids=name)
def test_every_number_middle_and_bfloat16_gets_its_code(built, index: int) -> None:
    checks.check_numbers(RUN, *built[index])


@pytest.mark.parametrize("index", range(len(UNSCALED)), ids=lambda i: str(UNSCALED[i]))
def test_codes_made_without_conversions_of_ptx_are_the_same(by_software, index: int) -> None:
    checks.check_numbers(RUN, *by_software[index])


def test_quotients_are_rounded_once(built) -> None:
    checks.check_quotients(RUN, built[0][0])


@pytest.mark.parametrize("index", indices([*FORMATS, *SCALES, *SPECIAL, *STORED]), ids=name)
def test_codes_and_scales_are_those_of_numerics(built, index: int) -> None:
    for m, k in ((1, 1), (24, 75), (3, 640), (130, 1000)):
        checks.check_rows(RUN, *built[index], m, k)


@pytest.mark.parametrize("m", [1, 6, 17, 1030])
@pytest.mark.parametrize("k", [4096, 4100, 8192, 8200, 14336, 20000, 53248, 65536, 65552])
def test_long_rows(built, m: int, k: int) -> None:
    """Up to sixteen rows have a cluster each, where they are longer than 4,096 and not 65,536."""
    some = [*FORMATS[len(UNSCALED) : len(UNSCALED) + 3], *SPECIAL[:2], *STORED[:4], PRODUCED[0]]
    for index in indices(some):
        if ALL[index].producer:
            checks.check_produced(RUN, *built[index], m, k)
        else:
            checks.check_rows(RUN, *built[index], m, k)


@pytest.mark.parametrize("index", indices(PRODUCED), ids=name)
def test_produced_values_are_those_of_torch_and_quantized_as_such(built, index: int) -> None:
    for m, k in ((1, 7), (5, 100), (33, 1152)):
        checks.check_produced(RUN, *built[index], m, k)


@pytest.mark.parametrize("index", indices(STORED_PRODUCED), ids=name)
def test_produced_values_are_stored_as_integers_and_products(built, index: int) -> None:
    if ALL[index].hadamard:
        checks.check_rotated(RUN, *built[index], 33, 1152)
        return
    for m, k in ((5, 100), (33, 1152), (2, 14336)):
        checks.check_produced(RUN, *built[index], m, k)


@pytest.mark.parametrize("producer", ["silu", "gelu", "gelu_tanh", "silu_mul"])
def test_activations_that_are_looked_up(built, producer: str) -> None:
    problem = next(p for p in STORED_PRODUCED if p.producer == producer and p.stored == "i8")
    checks.check_activations(RUN, *built[ALL.index(problem)], 200, 1088)


@pytest.mark.parametrize("index", indices(ROTATED), ids=name)
def test_transformed_values_are_within_roundings_of_fp64(built, index: int) -> None:
    checks.check_rotated(RUN, *built[index], 33, 1152)


@pytest.mark.parametrize("index", indices([*SPECIAL[:1], *SCALES[:24:5], PRODUCED[0]]), ids=name)
def test_nan_and_infinity_are_reported(built, index: int) -> None:
    checks.check_status(RUN, *built[index])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_gpu_computes_the_bits_of_the_emulation(built, tmp_path) -> None:
    some = [*PRODUCED[::3], *ROTATED]
    emulated = problems.emulated(some, tmp_path)
    on_cpu = checks.Runner("cpu")
    for i, problem in enumerate(some):
        library, index = built[ALL.index(problem)]
        x, beside = checks.gaussian(4, 384).to(checks.DTYPES[problem.input]), checks.NONE
        if problem.producer:
            given = checks.produced_case(problem, 4, 384)
            x, beside = given.x, given[1:5]
        expected = on_cpu.values(emulated, i, x, beside)
        assert torch.equal(RUN.values(library, index, x, beside), expected), str(problem)


@pytest.mark.parametrize(
    "text",
    ["f6E2M3FN@token:f32", "f6E2M3FN@block32:f8E8M0FNU", "f4E2M1FN@tensor:f32/block16:f8E4M3FN"],
)
@pytest.mark.parametrize(("m", "k"), [(4096, 4096), (517, 14336)])
def test_large_tensors(built, text: str, m: int, k: int) -> None:
    problem = QuantizeProblem(Operand.parse(text), "bf16")
    library, index = built[ALL.index(problem)]
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    checks.assert_is(RUN.quantize(library, index, x), x, problem)


def test_a_graph_replays_with_other_values(built) -> None:
    """A scale of the tensor needs a second kernel and memory that is cleared in between."""
    problem = QuantizeProblem(Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN"), "bf16")
    library, index = built[ALL.index(problem)]
    x = torch.randn(64, 512, device="cuda").to(torch.bfloat16)
    out = Quantized.empty(problem, 64, 512, "cuda")
    library.quantize(index, x, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.quantize(index, x, out)
    for factor in (1000.0, 0.001):
        x.normal_().mul_(factor)
        graph.replay()
        found = Quantized(*(tensor.cpu() for tensor in out))
        checks.assert_is(found, x.cpu(), problem)


def test_a_kernel_reads_what_the_one_before_it_wrote(built) -> None:
    """Each begins while the last one ends, also in graphs; the first writes what the next reads."""
    first = next(p for p in STORED if p.stored == BF16 and p.input == "bf16" and p.operand.block)
    then = QuantizeProblem(Operand.parse("f6E2M3FN@token:f32"), "bf16")
    (one, i), (two, j) = (built[ALL.index(problem)] for problem in (first, then))
    x = torch.randn(512, 1024, device="cuda").to(torch.bfloat16)
    between, out = (Quantized.empty(problem, 512, 1024, "cuda") for problem in (first, then))

    def chain() -> None:
        for _ in range(8):
            out.codes.zero_()
            between.codes.zero_()
            one.quantize(i, x, between)
            two.quantize(j, between.codes.view(torch.bfloat16), out)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for run in (chain, graph.replay) * 4:
        x.normal_()
        run()
        products, codes = (Quantized(*(t.cpu() for t in part)) for part in (between, out))
        checks.assert_is(products, x.cpu(), first)
        checks.assert_is(codes, products.codes.view(torch.bfloat16), then)


def test_a_kernel_runs_on_the_current_stream(built) -> None:
    problem = QuantizeProblem(Operand.parse("f6E2M3FN@token:f32"), "bf16")
    library, index = built[ALL.index(problem)]
    x, other = torch.randn(8, 256, device="cuda").to(torch.bfloat16), torch.cuda.Stream()
    out = Quantized.empty(problem, 8, 256, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(10_000_000)
        x.mul_(2)
        library.quantize(index, x, out)
    other.synchronize()
    codes, scales = quantize(x.cpu(), problem.operand)
    checks.assert_codes(Quantized(*(t.cpu() for t in out)), codes, problem)
    assert torch.equal(out.outer_scale.cpu(), scales[0].view(-1))
