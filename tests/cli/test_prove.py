"""``fpcompiler prove``: which kernel it compiles, what it prints, and when it fails."""

import json

import pytest

from fpcompiler.cli.main import main
from fpcompiler.codegen.proof.record import Check, ProofRecord

GOOD = Check.of("L0", "codes", "all 16", controls={"swapped": True})
BAD = Check.of("L2", "launch", "5 maps", findings=("a: too wide",))


@pytest.fixture
def proved(monkeypatch):
    """Take the place of compiling and of the checks; return what was asked for."""
    asked = []

    def use(*checks: Check) -> list:
        def prove(built, levels, options):
            asked.append((built.name, tuple(levels)))
            return ProofRecord(built.name, "sm_100a", {}, "0", "nvcc", checks)

        class Cache:
            @staticmethod
            def from_options(options):
                return Cache()

            def build(self, source):
                return source

        monkeypatch.setattr("fpcompiler.codegen.proof.prove.prove", prove)
        monkeypatch.setattr("fpcompiler.codegen.build.KernelCache", Cache)
        monkeypatch.setattr("fpcompiler.codegen.cutlass.emit", lambda instance: instance)
        return asked

    return use


def test_a_proof_is_printed_as_a_table(proved, capsys) -> None:
    asked = proved(GOOD, Check.skipped("L3", "machine code", "there is no cuobjdump"))
    assert main(["prove", "--target", "sm_100a"]) == 0
    ((name, levels),) = asked
    assert name == "gemm_sm_100a_nvf4_e2m1_e2m1_bf16_256x128x256c2x1"
    assert levels == ("L0", "L1", "L2", "L3", "L5", "L6")
    text = capsys.readouterr().out
    assert "1 of 1 red" in text
    assert "there is no cuobjdump" in text
    assert "1 passed, 1 skipped" in text
    assert "does not show" in text


def test_a_failure_is_an_exit_code_and_the_record_is_written(proved, capsys, tmp_path) -> None:
    asked = proved(GOOD, BAD)
    file = tmp_path / "proof.json"
    args = ["--scheme", "w4a6", "--rows", "decode", "--level", "L2", "-o", str(file)]
    assert main(["prove", "--target", "sm_120a", *args]) == 1
    assert asked == [("gemm_sm_120a_mxf8f6f4_e2m3_e2m1_bf16_128x128x128", ("L2",))]
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["passed"] is False
    assert record["checks"][1]["findings"] == ["a: too wide"]
    assert "a: too wide" in capsys.readouterr().out


def test_the_record_is_printed_as_json(proved, capsys) -> None:
    proved(GOOD)
    assert main(["prove", "--target", "sm_100a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"][0]["controls"] == {"swapped": True}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "sm_90"], "Did you mean sm_90a?"),
        (["--target", "sm_100a", "--level", "L9"], "there is no level L9; levels: L0, L1"),
        (["--target", "sm_100a", "--scheme", "w4a16"], "there is no FP4 kernel"),
        (["--target", "sm_90a", "--scheme", "nvfp4"], "tested on a Hopper GPU"),
        (["--target", "sm_100a", "--scheme", "w=none"], "leaves weights as they are"),
    ],
)
def test_what_cannot_be_proved_is_refused(args, message, proved, capsys) -> None:
    asked = proved(GOOD)
    assert main(["prove", *args]) == 1
    assert message in capsys.readouterr().err
    assert not asked
