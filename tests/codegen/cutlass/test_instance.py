"""Instances: which problems share one, and which tile it has."""

import pytest

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.cutlass.heuristics import load
from fpcompiler.codegen.cutlass.instance import Tile, choose, instances
from fpcompiler.codegen.problem import Activation, Epilogue, OutputType, Rows
from tests.codegen.problems import MXFP4, NVFP4, W4A6, W4A6_ROW, W4A8, instance_of, problem

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]


def test_layers_that_differ_in_sizes_share_an_instance() -> None:
    problems = [problem(W4A6, "sm_100a", shape=shape) for shape in SHAPES]
    assert len(set(choose(problems).values())) == 1


def test_scales_and_bias_need_no_instance_of_their_own() -> None:
    plain = problem(W4A6_ROW, "sm_100a")
    others = [
        problem(("e2m1@tensor:f32", "e2m3@token:f32"), "sm_100a"),
        problem(W4A6_ROW, "sm_100a", epilogue=Epilogue(bias=True)),
    ]
    assert {instance_of(other) for other in others} == {instance_of(plain)}


@pytest.mark.parametrize(
    "other",
    [
        problem(W4A6, "sm_103a"),
        problem(W4A6, "sm_100a", Rows.DECODE),
        problem(W4A6, "sm_100a", output=OutputType.F32),
        problem(W4A6, "sm_100a", epilogue=Epilogue(activation=Activation.GELU)),
        problem(W4A6, "sm_100a", epilogue=Epilogue(residual=True)),
        problem(W4A8, "sm_100a"),
        problem(MXFP4, "sm_100a"),
    ],
)
def test_types_functions_and_ranges_need_their_own(other) -> None:
    first, second = instance_of(problem(W4A6, "sm_100a")), instance_of(other)
    assert first != second
    assert first.name != second.name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", Rows)
def test_tiles_are_ones_that_the_hardware_has(arch, rows) -> None:
    collectives = ARCHS[arch].collectives
    pairs = [W4A6_ROW] if collectives == 90 else [NVFP4, MXFP4, W4A6, W4A6_ROW]
    for instance in [each for pair in pairs for each in instances(problem(pair, arch, rows))]:
        tile = instance.tile
        m, n, k = tile.of_one_sm
        assert tile.cluster[0] % tile.sms == 0
        assert tile.pingpong <= (collectives == 90)
        if collectives == 100:
            assert (m, tile.m) in ((128, 128), (128, 256))  # the rows of tcgen05.mma
            assert n in (64, 128, 192, 256)
        if collectives == 120:
            assert tile.cluster == (1, 1)
            assert (m % 128, n % 128) == (0, 0)  # atoms of block scales
        assert k in (128, 256)


class Preferring:
    """Estimates that depend on N of the tile; none for the sizes in ``unknown``."""

    def __init__(self, best_n: int, unknown: int = 0) -> None:
        self.best_n, self.unknown = best_n, unknown

    def seconds(self, problem, tile, cluster) -> float | None:
        assert tile[0] == 128  # of one SM, though two share the tile
        return None if problem.n == self.unknown else float(abs(tile[1] - self.best_n) + 1)


def test_estimates_decide_between_tiles() -> None:
    problems = [problem(W4A6, "sm_100a", shape=shape) for shape in SHAPES]
    for best in (128, 256):
        (instance,) = set(choose(problems, Preferring(best)).values())
        assert instance.tile == Tile(256, best, 128, (2, 1), sms=2)


def test_without_an_estimate_for_one_layer_the_rule_decides() -> None:
    problems = [problem(W4A6, "sm_100a", shape=shape) for shape in SHAPES]
    assert choose(problems, Preferring(256, unknown=192)) == choose(problems)


def test_the_heuristics_of_nvidia_estimate_every_tile() -> None:
    pytest.importorskip("nvMatmulHeuristics")
    estimator = load()
    assert estimator is not None
    for arch, pair in (("sm_90a", W4A6_ROW), ("sm_100a", W4A6), ("sm_103a", NVFP4)):
        for rows in Rows:
            layer = problem(pair, arch, rows)
            tiles = [instance.tile for instance in instances(layer)]
            times = [estimator.seconds(layer, tile.of_one_sm, tile.cluster) for tile in tiles]
            # A GEMM of 4096 x 4096 x 4096 at most takes milliseconds on each of these GPUs.
            assert all(seconds is not None and 1e-6 < seconds < 1e-2 for seconds in times)


def test_names_say_what_is_inside() -> None:
    layer = problem(
        W4A6, "sm_100a", epilogue=Epilogue(activation=Activation.GELU_TANH, residual=True)
    )
    name = "gemm_sm_100a_mxf8f6f4_e2m3_e2m1_bf16_gelu_tanh_residual_256x128x128c2x1"
    assert instance_of(layer).name == name
    assert instance_of(problem(W4A6_ROW, "sm_90a", Rows.DECODE)).name.endswith("64x64x128pp")
