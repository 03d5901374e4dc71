"""Every pair of formats on every target: a kernel, or a named reason."""

import itertools

import pytest

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.container import NATIVE
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Activation, BlockScale, Epilogue, OutputType, Rows
from fpcompiler.errors import TargetError
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand
from tests.codegen.problems import E3M0, NVFP4, W4A6, W4A6_ROW, problem

SIGNED = [spec.name for spec in FORMATS.values() if spec.signed]
# Of weights, of activations.
LEVELS = {
    "row and token": ("row:f32", "token:f32"),
    "block32 of E8M0": ("block32:f8E8M0FNU", "block32:f8E8M0FNU"),
    "block16 of E4M3": ("block16:f8E4M3FN", "block16:f8E4M3FN"),
    "block64 of E8M0": ("block64:f8E8M0FNU", "block64:f8E8M0FNU"),
    "block128 of f32": ("block128:f32", "block128:f32"),
}
LETTERS = {"mxf4": "4", "nvf4": "N", "mxf8f6f4": "X", "f8f6f4": "F", "fp8": "8"}


def outcome(weight: str, activation: str | None, levels: tuple[str, str], arch: str) -> str:
    """Return the letter of the kind of kernel, or a dot where there is a reason why not."""
    w = Operand.parse(f"{weight}@{levels[0]}")
    a = activation and Operand.parse(f"{activation}@{levels[1]}")
    try:
        found = legalize("mlp.up", w, a, (64, 64), arch, rows=Rows.DECODE)
    except TargetError as error:
        text = str(error)
        assert text.startswith("layer 'mlp.up': there is no FP4 kernel for w=")
        assert f"w={w},a={a or 'none'} on {arch}: " in text
        assert "Kernels there take " in text
        return "."
    assert (found.weight.source.name, found.activation.source.name) == (weight, activation)
    assert {found.weight.format.name, found.activation.format.name} <= set(NATIVE[found.kind])
    return LETTERS[found.kind]


def test_the_whole_table(golden) -> None:
    lines = ["Rows: weights; columns: activations, in the same order; last: 16 bits."]
    lines += [f"{letter}: {kind}" for kind, letter in LETTERS.items()] + [".: a reason"]
    for target, (name, levels) in itertools.product(
        ("sm_90a", "sm_100a", "sm_120a"), LEVELS.items()
    ):
        columns = [*SIGNED, None]
        rows = {w: "".join(outcome(w, a, levels, target) for a in columns) for w in SIGNED}
        some = any(set(row) != {"."} for row in rows.values())
        lines += ["", f"{target}, {name}{'' if some else ': none'}"]
        lines += [f"  {weight:9}{row}" for weight, row in rows.items() if some]
    golden("legalization.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", [n for n in ARCHS if ARCHS[n].target != n])
def test_members_of_a_family_take_what_their_target_takes(name) -> None:
    for levels, weight in itertools.product(LEVELS.values(), ("f4E2M1FN", "f4E3M0FN")):
        for activation in (*SIGNED, None):
            same = outcome(weight, activation, levels, ARCHS[name].target)
            assert outcome(weight, activation, levels, name) == same


def test_scales_go_where_they_cost_nothing() -> None:
    found = problem(W4A6, "sm_100a")
    assert found.scale is BlockScale.MX32
    assert found.epilogue == Epilogue(row_scale=True)
    assert problem(W4A6_ROW, "sm_100a").epilogue == Epilogue(row_scale=True, token_scale=True)
    assert problem(NVFP4, "sm_100a").epilogue == Epilogue(alpha=True)
    assert problem(E3M0, "sm_100a").epilogue == Epilogue()


def test_a_shift_of_a_container_goes_into_alpha() -> None:
    found = problem(("e2m1@row:f32", "e5m0@token:f32"), "sm_90a")
    assert found.container_exponent == -1
    assert found.epilogue == Epilogue(alpha=True, row_scale=True, token_scale=True)


def test_what_the_graph_asks_of_the_epilogue_stays() -> None:
    wanted = Epilogue(alpha=True, bias=True, activation=Activation.SILU, residual=True)
    found = problem(W4A6, "sm_100a", epilogue=wanted).epilogue
    assert found == Epilogue(row_scale=True, bias=True, activation=Activation.SILU, residual=True)


@pytest.mark.parametrize(
    ("output", "padding", "n"),
    [(OutputType.BF16, 8, 80), (OutputType.F16, 8, 80), (OutputType.F32, 4, 80)],
)
def test_sizes_are_padded(output, padding, n) -> None:
    found = problem(W4A6, "sm_100a", shape=(77, 130), output=output)
    assert (found.n_padding, found.padded_n, found.padded_k) == (padding, n, 256)
    assert problem(W4A6, "sm_100a", shape=(80, 128)).padded_k == 128


@pytest.mark.parametrize(("m", "rows"), [(1, "decode"), (128, "decode"), (129, "prefill")])
def test_ranges_of_m(m, rows) -> None:
    assert Rows.of(m) is Rows(rows)


@pytest.mark.parametrize(
    ("pair", "arch", "cause"),
    [
        (("e2m1@row:f32", None), "sm_100a", "its activations have 16 bits"),
        (W4A6, "sm_90a", "only after decoding to bf16"),
        (("e2m1@block128:f32", "e2m3@token:f32"), "sm_100a", "no instruction takes this pair"),
        (W4A6, "sm_80", "CUDA kernels cannot be compiled for 'sm_80'"),
    ],
)
def test_reasons(pair, arch, cause) -> None:
    weight, activation = (text and Operand.parse(text) for text in pair)
    with pytest.raises(TargetError, match=cause):
        legalize("mlp.up", weight, activation, (64, 64), arch, rows=Rows.DECODE)


def test_an_empty_layer_is_refused() -> None:
    with pytest.raises(TargetError, match=r"layer 'mlp.up': there is no GEMM of N = 0"):
        problem(W4A6, "sm_100a", shape=(0, 64))
