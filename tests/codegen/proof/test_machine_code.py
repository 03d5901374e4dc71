"""Machine code and descriptors: how they are read, and what must be noticed in them."""

import dataclasses

import pytest

from fpcompiler.codegen.problem import Epilogue, Rows
from fpcompiler.codegen.proof.descriptor import mma_descriptors
from fpcompiler.codegen.proof.disassembly import find_disassembler, parse_machine_code
from fpcompiler.codegen.proof.machine_code import (
    check_descriptors,
    check_machine_code,
    check_resources,
    descriptor_controls,
    machine_code_controls,
    spilled,
)
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options
from tests.codegen.problems import E3M0, MXFP4, NVFP4, W4A6_ROW, instance_of, problem
from tests.codegen.proof.samples import INSTANCE, sample


def code():
    return parse_machine_code(sample("sass"), sample("usage"))


def test_what_cuobjdump_prints_is_read() -> None:
    found = code()
    assert found.arch == "sm_100a"
    assert (found.registers, found.stack, found.local, found.shared) == (136, 0, 0, 1024)
    assert found.opcodes["UTCQMMA"] == 4
    assert found.opcodes["BRA"] == 13  # with a predicate
    assert found.opcodes["UTMALDG.4D"] == 4
    assert next(iter(found.to_json()["opcodes"])) == "BRA"


def test_a_library_with_other_than_one_function_is_refused() -> None:
    with pytest.raises(TargetError, match="0 GPU functions"):
        parse_machine_code("", "")
    with pytest.raises(TargetError, match="2 GPU functions"):
        parse_machine_code(2 * sample("sass"), sample("usage"))


def test_the_code_of_the_instance_passes_and_every_control_is_noticed() -> None:
    assert check_machine_code(code(), INSTANCE) == ()
    controls = machine_code_controls(INSTANCE)
    assert [*controls] == ["kind nvf4", "kind mxf4", "kind f8f6f4", "the other number of SMs"]
    for name, wrong in controls.items():
        assert check_machine_code(code(), wrong), name


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("UTCQMMA", "UTCHMMA", "it multiplies with 4 UTCHMMA"),
        ("UTCQMMA ", "UTCQMMA.2CTA ", "it multiplies with 4 UTCQMMA.2CTA"),
        ("/*3d40*/                   UTCQMMA", "/*3d40*/                   NOP", "steps of 4"),
        ("UTMALDG.4D", "LDG", "UTMALDG.4D is not there"),
        ("UTCCP", "NOP", "UTCCP is not there"),
        ("LDTM.x32", "LDSM.U4x16P64TO8.M816.4", "LDTM is not there"),
        ("arch = sm_100a", "arch = sm_103a", "the code is for sm_103a"),
    ],
)
def test_other_code_is_noticed(right, wrong, finding) -> None:
    assert right in sample("sass")
    found = parse_machine_code(sample("sass").replace(right, wrong), sample("usage"))
    assert any(finding in line for line in check_machine_code(found, INSTANCE))


def opcodes(*names: str):
    rows = "".join(f"        /*{16 * i:04x}*/   {name} R1 ;\n" for i, name in enumerate(names))
    text = f"arch = ARCH\n\t\tFunction : f\n{rows}"
    return lambda arch: parse_machine_code(
        text.replace("ARCH", arch), "Function f:\n REG:168 STACK:0 SHARED:1024 LOCAL:0"
    )


MOVES = ("UTMALDG.3D", "UTMASTG.3D", "UTMALDG.4D")
BYTES = ("LDSM.U4x16P64TO8.M816.4", "LDSM.U6x16P32TO8.M816.4")
LEGAL = [
    (problem(NVFP4, "sm_120a"), 2 * ["OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"], MOVES),
    (problem(MXFP4, "sm_120a"), 2 * ["OMMA.SF.16864.F32.E2M1.E2M1.E8"], MOVES),
    (problem(E3M0, "sm_120a"), 4 * ["QMMA.SF.16832.F32.E3M2.E3M2.E8"], (*MOVES, BYTES[1])),
    (problem(W4A6_ROW, "sm_120a"), 4 * ["QMMA.16832.F32.E2M3.E2M1"], (*MOVES[:2], *BYTES)),
    (problem(W4A6_ROW, "sm_90a", Rows.DECODE), 4 * ["QGMMA.64x64x32.F32.E4M3.E4M3"], MOVES[:2]),
    (problem(NVFP4, "sm_100a"), 4 * ["UTCOMMA.2CTA.4X"], (*MOVES, "UTCCP.T.S.2CTA", "LDTM.x32")),
    (problem(NVFP4, "sm_103a"), 4 * ["UTCOMMA.2CTA.BLOCK16"], (*MOVES, "UTCCP.T", "LDTM.x32")),
    (problem(W4A6_ROW, "sm_100a"), 4 * ["UTCQMMA.2CTA"], (*MOVES[:2], "LDTM.x32")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "multiply", "moves"), LEGAL, ids=[instance_of(row[0]).name for row in LEGAL]
)
def test_each_kind_has_its_instruction_and_no_other(layer, multiply, moves) -> None:
    instance = instance_of(layer)
    found = opcodes(*multiply, *moves)(layer.arch)
    assert check_machine_code(found, instance) == ()
    for name, wrong in machine_code_controls(instance).items():
        assert check_machine_code(found, wrong), name
    for other in LEGAL:
        if instance_of(other[0]) != instance:
            assert check_machine_code(found, instance_of(other[0]))


def test_spills_are_noticed() -> None:
    assert check_resources(code()) == ()
    assert check_resources(spilled(code())) == ("1 instructions that spill: STL.64",)
    assert check_resources(dataclasses.replace(code(), stack=704)) == (
        "704 bytes of stack, 0 of local memory",
    )
    assert check_resources(dataclasses.replace(code(), registers=0)) == ("0 registers",)


def test_the_descriptor_is_followed_to_its_constants() -> None:
    (found,) = mma_descriptors(sample("ptx"))
    assert found.bits == 0x08901580
    # What is known at run time only are the places of two scales in their words.
    assert found.known == 0xFFFFFFFF & ~(0b11 << 4 | 0b11 << 29)
    assert (found.kind, found.sms, found.block, found.sums) == ("mxf8f6f4", 1, 32, "f32")
    assert (found.a, found.b, found.scale) == ("f6E2M3FN", "f4E2M1FN", "f8E8M0FNU")
    assert (found.m, found.n, found.plain) == (128, 64, True)


def test_the_descriptor_of_the_instance_passes_and_every_control_is_noticed() -> None:
    found = mma_descriptors(sample("ptx"))
    assert check_descriptors(found, INSTANCE) == ()
    controls = descriptor_controls(INSTANCE)
    assert "formats of A and B swapped" in controls
    for name, wrong in controls.items():
        assert check_descriptors(found, wrong), name
    assert check_descriptors((), INSTANCE) == ("the PTX has no tcgen05.mma",)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("5504", "5376"),  # E4M3 by E2M1 ... as the codes say
        ("2192", "2194"),  # another N
        ("or.b16 %rs15, %rs14, 5504", "xor.b16 %rs15, %rs14, 5504"),  # not followed: not known
        ("and.b16 %rs14, %rs13, 48", "and.b16 %rs14, %rs13, 8191"),  # formats at run time
        ("mov.b32 %r206", "@%p1 mov.b32 %r206"),  # perhaps another value
        ("add.s32 %r145", "mov.b32 %r206, 0;\nadd.s32 %r145"),  # two values
        ("kind::mxf8f6f4.block_scale", "kind::f8f6f4"),
        ("cta_group::1", "cta_group::2"),
    ],
)
def test_other_descriptors_are_noticed(right, wrong) -> None:
    assert right in sample("ptx")
    found = mma_descriptors(sample("ptx").replace(right, wrong))
    assert check_descriptors(found, INSTANCE)


def test_a_constant_descriptor_is_read() -> None:
    text = (
        "mov.b32 %r9, 270538128;\n"
        "tcgen05.mma.cta_group::2.kind::f8f6f4 [%r1], %rd1, %rd2, %r9, {%r3, %r3}, p;\n"
    )
    instance = instance_of(problem(W4A6_ROW, "sm_100a", epilogue=Epilogue()))
    found = mma_descriptors(text)
    assert check_descriptors(found, instance) == ()
    assert found[0].known == 0xFFFFFFFF
    assert all(check_descriptors(found, wrong) for wrong in descriptor_controls(instance).values())


def test_a_missing_disassembler_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("fpcompiler.codegen.proof.disassembly._TOOLKIT", tmp_path)
    monkeypatch.setattr("fpcompiler.codegen.proof.disassembly._package_folders", list)
    with pytest.raises(DependencyError, match="no cuobjdump; pip install nvidia-cuda-cuobjdump"):
        find_disassembler(Options())
