"""The kernels that quantize, compiled for the CPU and run there: every byte against numerics."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence

import pytest
import torch

from fpcompiler.errors import ArtifactError, NumericsError
from fpcompiler.numerics import quantize_with
from fpcompiler.runtime.cuda import Quantized, QuantizeLibrary
from fpcompiler.runtime.cuda.quantize import arguments_of
from fpcompiler.runtime.cuda.stored import I8
from fpcompiler.runtime.fused import HEADS
from tests.codegen.cuda import checks, problems
from tests.numerics.test_scaling import gaussian

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

UNSCALED = problems.formats()[: len(problems.ELEMENTS)]
FORMATS = [*UNSCALED, *problems.formats()[len(UNSCALED) :: 2]]
SCALES = problems.all_scales(("f4E2M1FN",), ("bf16", "f32", "f16"))
SPECIAL = problems.special()
SOME_PRODUCERS = (
    *HEADS, "rms_norm_mul", "rms_norm_wide_add", "layer_norm_modulate", "silu_mul", "gelu_tanh_add",
)  # fmt: skip
PRODUCED = [*problems.produced(("bf16",), SOME_PRODUCERS), *problems.mixed()]
ROTATED = problems.rotated()
STORED = problems.stored()
INTEGERS = [problem for problem in STORED if problem.stored == I8]
EIGHTHS = next(problem for problem in INTEGERS if problem.operand.format.name == "f6E2M3FN")
STORED_PRODUCED = problems.stored_of_producers(SOME_PRODUCERS)
ALL = [*FORMATS, *SCALES, *SPECIAL, *PRODUCED, *ROTATED, *STORED, *STORED_PRODUCED]
RUN = checks.Runner("cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> QuantizeLibrary:
    return problems.emulated(ALL, tmp_path_factory.mktemp("emulated"))


def indices(of: Sequence[object]) -> list[int]:
    return [ALL.index(problem) for problem in of]


def name(index: int) -> str:
    return str(ALL[index])


@pytest.mark.parametrize("index", indices(UNSCALED), ids=name)
def test_every_number_middle_and_bfloat16_gets_its_code(library, index: int) -> None:
    checks.check_numbers(RUN, library, index)


def test_quotients_are_rounded_once(library) -> None:
    checks.check_quotients(RUN, library)


def test_one_correction_rounds_every_quotient_that_is_close_to_a_middle(library) -> None:
    function, wrong = library._library.fpc_test_hard_quotients, ctypes.c_int64()
    function.restype = ctypes.c_int64
    assert function(ctypes.byref(wrong)) > 60_000_000
    assert wrong.value == 0


@pytest.mark.parametrize(
    ("first", "step", "count"),
    [(0, 2039, (1 << 32) // 2039), (0x42B00000, 1, 1 << 18), (0xC2A00000, 1, 1 << 18)],
)
def test_exp_plus_one_has_the_bits_of_exp(library, first: int, step: int, count: int) -> None:
    """All sizes of numbers, those around 88.7, where exp leaves fp32, and those around -80."""
    function = library._library.fpc_test_exp_plus_one
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64)
    assert function(first, step, count) == 0


@pytest.mark.parametrize("index", indices([*FORMATS, *SCALES, *SPECIAL, *STORED]), ids=name)
def test_codes_and_scales_are_those_of_numerics(library, index: int) -> None:
    for m, k in ((1, 1), (24, 75), (3, 640)):
        checks.check_rows(RUN, library, index, m, k)


@pytest.mark.parametrize("k", [8192, 8200, 14336, 20000])
def test_long_rows(library, k: int) -> None:
    """Rows that are held in registers, a chunk or two a thread, and rows that are read again."""
    for index in indices([FORMATS[len(UNSCALED)], SCALES[2], INTEGERS[0]]):
        checks.check_rows(RUN, library, index, 17, k)


def test_many_rows(library) -> None:
    """A thread takes two chunks of short ones, and a block one row after another."""
    for problem in (INTEGERS[0], EIGHTHS):
        checks.check_rows(RUN, library, ALL.index(problem), 1030, 2050)
    silu = next(problem for problem in STORED_PRODUCED if problem.producer == "silu_mul")
    checks.check_produced(RUN, library, ALL.index(silu), 1024, 2048)


@pytest.mark.parametrize("producer", ["silu", "gelu", "gelu_tanh", "silu_mul"])
def test_activations_that_are_looked_up(library, producer: str) -> None:
    problem = next(p for p in STORED_PRODUCED if p.producer == producer and p.stored == I8)
    checks.check_activations(RUN, library, ALL.index(problem), 2, 600)


@pytest.mark.parametrize("k", [4097, 8200, 14336, 65536, 65552])
def test_a_few_long_rows(library, k: int) -> None:
    """Rows that two to eight blocks of a cluster share, up to the longest one."""
    for index in indices([FORMATS[len(UNSCALED)], SCALES[2], INTEGERS[0], EIGHTHS]):
        checks.check_rows(RUN, library, index, 3, k)


def test_nan_in_a_row_of_several_blocks(library) -> None:
    index, x = ALL.index(EIGHTHS), gaussian(2, 9000).to(checks.DTYPES[EIGHTHS.input])
    assert int(RUN.quantize(library, index, x, checks.NONE).status) == 0
    for place in (0, 4000, 8999):
        for value in (torch.nan, -torch.inf):
            other = x.clone()
            other[1, place] = value
            assert int(RUN.quantize(library, index, other, checks.NONE).status) == 1


def test_without_conversions(tmp_path) -> None:
    """As kernels are made for comparisons: E4M3, and the integers that come by it on Hopper."""
    e4m3 = next(p for p in UNSCALED if p.operand.format.name == "f8E4M3FN")
    library = problems.emulated([e4m3, EIGHTHS, STORED_PRODUCED[0]], tmp_path, level=0)
    checks.check_numbers(RUN, library, 0)
    for m, k in ((1, 1), (24, 75), (3, 9000)):
        checks.check_rows(RUN, library, 1, m, k)


@pytest.mark.parametrize(("m", "k"), [(2, 4100), (2, 8200), (1, 14336), (17, 8200), (17, 16400)])
def test_long_rows_of_producers(library, m: int, k: int) -> None:
    silu = next(problem for problem in STORED_PRODUCED if problem.producer == "silu_mul")
    for index in indices([*PRODUCED[:3], *problems.mixed(), silu]):
        checks.check_produced(RUN, library, index, m, k)


def test_rows_of_swizzled_scales_are_filled_up(library) -> None:
    for index in indices([problem for problem in SCALES if problem.swizzled][:2]):
        checks.check_rows(RUN, library, index, 130, 160)


@pytest.mark.parametrize("index", indices([p for p in SPECIAL if p.given]), ids=name)
def test_a_given_scale_saturates(library, index: int) -> None:
    problem = ALL[index]
    x, scale = gaussian(3, 80).to(checks.DTYPES[problem.input]), torch.tensor([0.3])
    x[0, 0] = 1e38
    found = RUN.quantize(library, index, x, given=scale)
    assert int(found.status) == 0
    assert float(found.outer_scale) == float(scale)
    if problem.operand.block is None:
        codes = quantize_with(x, (scale.view(1, 1),), problem.operand)
        checks.assert_codes(found, codes, problem)


@pytest.mark.parametrize("index", indices(INTEGERS), ids=name)
def test_the_largest_sums_of_integers(library, index: int) -> None:
    problem = ALL[index]
    x = torch.full((3, 2064), 3.0).to(checks.DTYPES[problem.input])
    x[1], x[2, :5] = -3.0, 0.0
    checks.assert_is(RUN.quantize(library, index, x), x, problem)


@pytest.mark.parametrize("index", indices(PRODUCED), ids=name)
def test_produced_values_are_those_of_torch_and_quantized_as_such(library, index: int) -> None:
    for m, k in ((1, 7), (5, 100), (2, 1152)):
        checks.check_produced(RUN, library, index, m, k)


@pytest.mark.parametrize("index", indices(STORED_PRODUCED), ids=name)
def test_produced_values_are_stored_as_integers_and_products(library, index: int) -> None:
    if ALL[index].hadamard:
        checks.check_rotated(RUN, library, index, 3, 384)
    else:
        checks.check_produced(RUN, library, index, 3, 100)


@pytest.mark.parametrize("index", indices(ROTATED), ids=name)
def test_transformed_values_are_within_roundings_of_fp64(library, index: int) -> None:
    checks.check_rotated(RUN, library, index, 3, 384)


@pytest.mark.parametrize(
    "index", indices([FORMATS[0], FORMATS[-1], SCALES[5], PRODUCED[0], PRODUCED[4]]), ids=name
)
def test_nan_and_infinity_are_reported(library, index: int) -> None:
    checks.check_status(RUN, library, index)


def test_rows_beside_x_are_shared(library) -> None:
    """adaLN has one scale and one shift for the tokens of each sample, as parts of a tensor."""
    index = next(i for i, p in enumerate(ALL) if p.producer == "layer_norm_modulate")
    batch, tokens, channels = 3, 5, 48
    plain = checks.produced_case(ALL[index], 1, channels)
    both = gaussian(batch, 1, 2 * channels).to(torch.bfloat16)
    x = gaussian(batch, tokens, channels).to(torch.bfloat16)
    beside = (*plain[1:3], both[..., :channels], both[..., channels:])
    shared = RUN.values(library, index, x, beside)
    for sample in range(batch):
        own = (*plain[1:3], both[sample, 0, :channels], both[sample, 0, channels:])
        alone = RUN.values(library, index, x[sample], own)
        assert torch.equal(shared.view(batch, tokens, channels)[sample], alone)


def test_no_rows_are_no_work(library) -> None:
    problem = ALL[0]
    out = Quantized.empty(problem, 0, 64, "cpu")
    library.launch(0, arguments_of(problem, torch.empty(0, 64), out), 0)


def test_impossible_arguments_are_refused(library) -> None:
    index = indices([ROTATED[0]])[0]
    problem = ALL[index]
    x = torch.zeros(2, 40, dtype=torch.bfloat16)
    with pytest.raises(NumericsError, match="does not take 2 rows of 40 values"):
        RUN.quantize(library, index, x)
    with pytest.raises(NumericsError, match="does not read f32"):
        RUN.quantize(library, index, x.float())
    with pytest.raises(NumericsError, match="equal distances"):
        RUN.quantize(library, index, x.t())
    with pytest.raises(NumericsError, match="do not hold"):
        arguments_of(problem, x, Quantized.empty(problem, 1, 40, "cpu"))


def test_a_library_of_other_problems_is_refused(library, tmp_path) -> None:
    path = library._library._name
    with pytest.raises(ArtifactError, match="kernel 0 is"):
        QuantizeLibrary(path, ALL[1:])
    other = tmp_path / "other.so"
    other.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="no library of quantizers"):
        QuantizeLibrary(other, ALL)
