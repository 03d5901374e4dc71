"""The model of times says of launches what the launches themselves say, compiled for a CPU."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fpcompiler.codegen.hopper import PackedGemm, emit, packed_gemm
from fpcompiler.codegen.problem import OutputType
from fpcompiler.operand import Operand
from fpcompiler.runtime.costs import LayerCall
from fpcompiler.runtime.costs.hopper import hopper_costs, kind_of, tiles_of
from fpcompiler.scheme.presets import find_preset
from tests.codegen.hopper.test_launch import HOST, call, without_assembly

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

RECORD = Path(__file__).parents[3] / "examples/benchmarks/results/hopper_layers.json"
SMS = 132
LEAST_TIME = """
namespace fpc {
template <class P, class... Timed>
int64_t least_time(const FpcGemmArguments& a, TileList<Timed...>) {
    int64_t least = INT64_MAX;
    ((a.k / kUnitK >= Timed::Tile::kSplit && time_of<Timed>(a, a.sm_count) < least
          ? (void)(least = time_of<Timed>(a, a.sm_count)) : (void)0), ...);
    return least;
}
}  // namespace fpc
FPC_EXPORT int64_t test_least_time(int m, int n, int k, int sms) {
    FpcGemmArguments a{};
    a.m = m, a.n = n, a.k = k, a.sm_count = sms;
    return fpc::least_time<Problem>(a, fpc::ManyTiles<Problem>::List{});
}
"""


@pytest.fixture(scope="module", params=["w4a6-row", "w4a8-row", "w4a16", "bf16 rows"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Operand, Operand | None, ctypes.CDLL]:
    preset = find_preset("w4a16" if request.param == "bf16 rows" else request.param)
    weight = Operand.parse(preset.weight)
    if request.param == "bf16 rows":
        weight = Operand.parse("f4E2M1FN@row:f32")
    activation = None if preset.activation == "none" else Operand.parse(preset.activation)
    instance = packed_gemm(weight, activation, "sm_90a", OutputType.BF16)
    assert isinstance(instance, PackedGemm)
    path = tmp_path_factory.mktemp("costs") / "kernel.cpp"
    text = without_assembly(emit(instance).text) + (HOST / "launches.h").read_text("utf-8")
    path.write_text(text + LEAST_TIME, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{HOST}", "-include", "cuda.h"]
    subprocess.run(["g++", *flags, str(path), "-o", str(path.with_suffix(".so"))], check=True)
    library = ctypes.CDLL(str(path.with_suffix(".so")))
    library.test_calls.restype = ctypes.c_char_p
    library.test_least_time.restype = ctypes.c_int64
    return weight, activation, library


def test_the_time_of_tiles_is_that_of_the_launch(
    built: tuple[Operand, Operand | None, ctypes.CDLL],
) -> None:
    weight, activation, library = built
    kind = kind_of(weight, activation)
    assert kind is not None
    tiles = hopper_costs().tiles[tiles_of(weight, kind)]
    for n in (576, 1152, 4096, 14336):
        for k in (128, 640, 4096, 14336):
            for m in (1, 24, 100, 512, 3000, 8192):
                own = min(tile.microseconds(m, n, k, SMS) for tile in tiles)
                nanoseconds = library.test_least_time(m, n, k, SMS)
                assert own == pytest.approx(nanoseconds / 1000), (m, n, k)


def test_few_tokens_are_those_that_get_their_kernel(
    built: tuple[Operand, Operand | None, ctypes.CDLL],
) -> None:
    """For the sizes that times were recorded of."""
    weight, activation, library = built
    kind = kind_of(weight, activation)
    assert kind is not None
    for row in json.loads(RECORD.read_text())["rows"]:
        m, n, k = row["m"], row["n"], row["k"]
        status, calls = call(library, m, n, k, SMS)
        assert status == 0
        few = hopper_costs().has_few(LayerCall(m, n, k, weight, activation), kind)
        assert few == (calls == "AL"), (m, n, k)
