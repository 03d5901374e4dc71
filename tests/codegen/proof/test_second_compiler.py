"""What CuTe DSL makes of the instance of the samples, and what must be noticed in it."""

import dataclasses
import json
import sys

import pytest

from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass import emit
from fpcompiler.codegen.dsl import aot
from fpcompiler.codegen.dsl.aot import build, why_not
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.proof.descriptor import mma_descriptors
from fpcompiler.codegen.proof.launch import MapType, Swizzle
from fpcompiler.codegen.proof.record import Outcome
from fpcompiler.codegen.proof.second_compiler import (
    SHAPE,
    check_second_compiler,
    compare_descriptors,
    compare_maps,
    decode_map,
)
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options
from tests.codegen.problems import NVFP4, W4A6_ROW, instance_of, problem
from tests.codegen.proof import samples
from tests.codegen.proof.samples import INSTANCE, dsl_ptx, sample


def words(*rows: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for row in rows for word in row.split()) + (0,) * 16


# The words of 300 x 520 x 640, as CuTe DSL 4.8.1 filled them in.
MAPS = {
    "a": words(
        "00000000 00000100 002466a2 0000001e 00002328 00000000 00000000 00000000",
        "0000027f 0000012b 00000000 00000000 00000000 7f000000 0000007f 00000000",
    ),
    "b": words(
        "00000000 00000200 00246622 00000014 000028a0 00000000 00000000 00000000",
        "0000027f 00000207 00000000 00000000 00000000 7f000000 0000003f 00000000",
    ),
    "a_scales": words(
        "00000000 00000300 000400b2 000000a0 00000020 000001e0 00000000 00000000",
        "000000ff 00000002 00000004 00000000 00000000 ff000000 00000000 00000000",
    ),
    "b_scales": words(
        "00000000 00000400 000400b2 000000a0 00000020 00000320 00000000 00000000",
        "000000ff 00000004 00000004 00000000 00000000 ff000000 00000000 00000000",
    ),
    "d": words(
        "00000000 00000500 00244522 00000041 00004c2c 00000000 00000000 00000000",
        "00000207 0000012b 00000000 00000000 00000000 1f000000 0000007f 00000000",
    ),
}


def decoded(**changed: tuple[int, ...]):
    return tuple(decode_map(name, row) for name, row in (MAPS | changed).items())


def test_a_tensor_map_is_read() -> None:
    a, *_, d = decoded()
    assert (a.type, a.swizzle) == (MapType.U6_UNPACKED, Swizzle.B128)
    assert (a.sizes, a.strides, a.box) == ((640, 300, 1), (480, 144000), (128, 128, 1))
    assert (d.type, d.swizzle, d.sizes[:2]) == (MapType.BFLOAT16, Swizzle.B64, (520, 300))
    assert SHAPE == samples.SHAPE


def test_elements_of_another_type_are_refused() -> None:
    of_floats = (*MAPS["a"][:2], 0x00246422, *MAPS["a"][3:])
    with pytest.raises(TargetError, match="the tensor map of a has elements of type 8"):
        decode_map("a", of_floats)


def test_both_compilers_ask_for_the_same_tensors() -> None:
    assert compare_maps(samples.launch().maps, decoded()) == ()


@pytest.mark.parametrize(
    ("tensor", "word", "value"),
    [
        ("a", 2, 0x00246622),  # four bits
        ("a", 2, 0x002446A2),  # another swizzle
        ("a", 3, 0x28),  # bytes in a row
        ("a", 8, 0x2FF),  # values in a row
        ("b", 9, 0x12B),  # rows
        ("b", 14, 0x7F),  # rows of a copy
        ("a_scales", 3, 0x20),  # atoms in another order
        ("b_scales", 13, 0x7F000000),  # half an atom
    ],
)
def test_other_tensors_are_noticed(tensor, word, value) -> None:
    changed = tuple(value if i == word else old for i, old in enumerate(MAPS[tensor]))
    (finding,) = compare_maps(samples.launch().maps, decoded(**{tensor: changed}))
    assert finding.startswith(f"{tensor}: ")


def test_a_missing_map_is_noticed() -> None:
    assert len(compare_maps(samples.launch().maps, decoded()[:3])) == 1
    assert len(compare_maps((), decoded())) == 4


def test_both_compilers_ask_for_the_same_product() -> None:
    ours, theirs = mma_descriptors(sample("ptx")), mma_descriptors(dsl_ptx())
    assert compare_descriptors(ours, theirs) == ()
    # There both operands may be negated, as an argument of the kernel says.
    assert ours[0].known & ~theirs[0].known == 1 << 13 | 1 << 14
    assert (theirs[0].a, theirs[0].b, theirs[0].m, theirs[0].n) == ("f6E2M3FN", "f4E2M1FN", 128, 64)


@pytest.mark.parametrize("bit", [7, 9, 10, 12, 15, 16, 17, 22, 23, 24, 28])
def test_another_product_is_noticed(bit) -> None:
    (ours,), theirs = mma_descriptors(sample("ptx")), mma_descriptors(dsl_ptx())
    other = dataclasses.replace(ours, bits=ours.bits ^ 1 << bit)
    assert compare_descriptors((other,), theirs)
    unknown = dataclasses.replace(ours, known=ours.known & ~(1 << bit))
    assert "are not known" in compare_descriptors((unknown,), theirs)[0]


def test_no_product_is_noticed() -> None:
    ours = mma_descriptors(sample("ptx"))
    assert compare_descriptors(ours, ()) == ("one of the two has no tcgen05.mma",)
    (wide,) = (dataclasses.replace(one, instruction=one.instruction.replace("::1", "::2"))
               for one in ours)  # fmt: skip
    assert compare_descriptors((wide,), mma_descriptors(dsl_ptx()))


def test_what_it_does_not_compile_is_said(monkeypatch) -> None:
    monkeypatch.setattr(aot, "_version", lambda name: aot._PACKAGES[name])
    assert why_not(INSTANCE) == ""
    assert "not on sm_120a" in why_not(instance_of(problem(NVFP4, "sm_120a")))
    assert "without block scales" in why_not(instance_of(problem(W4A6_ROW, "sm_100a")))
    monkeypatch.setattr(aot, "_version", lambda name: "9.9")
    assert "nvidia-cutlass-dsl 9.9" in why_not(INSTANCE)
    monkeypatch.setattr(aot, "_version", lambda name: "")
    assert "nvidia-cutlass-operators is not installed" in why_not(INSTANCE)


def test_without_it_nothing_is_compiled(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(aot, "_version", lambda name: "")
    with pytest.raises(DependencyError, match=r"pip install 'fpcompiler\[dsl\]'"):
        build(INSTANCE, tmp_path)
    folder = tmp_path / "kernel.so"
    checks = check_second_compiler(BuiltKernel(folder, {}, cached=True), INSTANCE, Options())
    assert {check.outcome for check in checks} == {Outcome.SKIPPED}


CHILD = """
import json, os, pathlib, sys
request = json.loads(sys.argv[1])
folder = pathlib.Path(request["folder"])
(folder / "request.json").write_text(json.dumps([request, os.environ["CUTE_DSL_ARCH"]]))
(folder / "kernel.ptx").write_text("the ptx")
print("a line of the compiler")
print(json.dumps({"import_seconds": 2.0, "compile_seconds": 0.5}))
"""


def test_it_is_asked_for_the_formats_of_the_instance(monkeypatch, tmp_path) -> None:
    child, folder = tmp_path / "child.py", tmp_path / "out"
    folder.mkdir()
    child.write_text(CHILD, encoding="utf-8")
    monkeypatch.setattr(aot, "_version", lambda name: aot._PACKAGES[name])
    monkeypatch.setattr(aot, "_CHILD", child)
    kernel = build(INSTANCE, folder)
    assert (kernel.ptx, kernel.compile_seconds, kernel.object) == ("the ptx", 0.5, folder / "k.o")
    request, arch = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    assert arch == "sm_100a"
    wanted = {"a": "Float6E2M3FN", "b": "Float4E2M1FN", "scale": "Float8E8M0FNU", "block": 32}
    assert wanted.items() <= request.items()
    child.write_text("raise SystemExit('no such kernel')", encoding="utf-8")
    with pytest.raises(TargetError, match=r"did not compile gemm_sm_100a\S+\sno such kernel"):
        build(INSTANCE, folder)


@pytest.mark.nvcc
def test_the_real_compilers_agree() -> None:
    if reason := why_not(INSTANCE):
        pytest.skip(reason)
    kernel = KernelCache.from_options(Options.from_env()).build(emit(INSTANCE))
    checks = check_second_compiler(kernel, INSTANCE, Options.from_env())
    assert [check.outcome for check in checks] == [Outcome.PASSED, Outcome.PASSED]
    assert "cutlass" not in sys.modules
