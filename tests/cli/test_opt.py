"""``fpcompiler opt``: any pass, also one that learns from data, runs again on any dump."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fpcompiler
from fpcompiler.cli.main import main
from fpcompiler.errors import OptionError
from tests.models import normal
from tests.passes.tiny import Mlp, tiny

BATCHES = [normal(40, 32, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps with values, and the batches as files."""
    folder = tmp_path_factory.mktemp("dumps")
    for number, batch in enumerate(BATCHES):
        save_file({"0": batch}, folder / f"batch{number}.safetensors")
    fpcompiler.compile(
        tiny(Mlp), "w4a6,skip=none", calibration=BATCHES, method="rotate-gptq",
        dump_dir=folder / "dumps", dump_weights=True,
    )  # fmt: skip
    return folder / "dumps"


def steps(folder: Path) -> list[str]:
    return (folder / "pipeline.txt").read_text().strip().split(",")


def test_each_dump_has_only_what_is_new(folder: Path) -> None:
    names = [set(load_file(file)) for file in sorted(folder.glob("*.safetensors"))]
    assert len(names) > 2
    assert not set.intersection(*names[:2])
    assert len(set.union(*names)) == sum(map(len, names))


@pytest.mark.parametrize("name", ["rotate", "gptq", "lower-gemm"])
def test_a_pass_runs_again_as_the_dump_says(folder: Path, name: str, tmp_path: Path) -> None:
    (after,) = folder.glob(f"*-{name}.mlir")
    header, _, wanted = after.read_text().partition("\n")
    before, text = header.removeprefix("// fpcompiler opt ").split(" -p ")
    arguments = ["opt", str(folder / before), "-p", text.strip("'"), "-o", str(tmp_path / "x")]
    batches = sorted(str(file) for file in folder.parent.glob("batch*.safetensors"))
    main([*arguments, "--calibration", *batches])
    assert (tmp_path / "x").read_text() == wanted


def test_without_values_or_data_the_error_says_what_to_give(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rotated,) = folder.glob("*-rotate.mlir")
    alone = tmp_path / rotated.name
    alone.write_text(rotated.read_text())
    assert main(["opt", str(rotated), "-p", "gptq"]) != 0
    assert "gptq needs calibration data" in capsys.readouterr().err
    assert main(["opt", str(alone), "-p", "quantize-weights"]) != 0
    assert "--weights FILE" in capsys.readouterr().err
    named = tmp_path / "named.safetensors"
    save_file({"x": BATCHES[0]}, named)
    assert main(["opt", str(rotated), "-p", "gptq", "--calibration", str(named)]) != 0
    assert "by their order, not by names such as 'x'" in capsys.readouterr().err


def test_values_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FPC_DUMP", raising=False)
    with pytest.raises(OptionError, match="dump_weights= needs a folder"):
        fpcompiler.compile(tiny(Mlp), example_inputs=torch.ones(2, 32), dump_weights=True)
