"""``fpcompiler import``, ``convert`` and ``export`` of checkpoints, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fpcompiler.cli.main import main
from fpcompiler.interop.checkpoints.reading import read_checkpoint
from tests.interop.folders import DATA, edit_tensors, write

pytest.importorskip("transformers")
TOOL = DATA / "llmcompressor-nvfp4"


def test_import_convert_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, again, folder = (str(tmp_path / name) for name in ("model.fpc", "again", "folder"))
    assert main(["import", str(TOOL), "-o", file, "--original", str(DATA / "base"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifact"] == file
    assert main(["convert", file, again, "--model", str(TOOL)]) == 0
    assert "7 quantized layers" in capsys.readouterr().out
    options = ["--format", "compressed-tensors", "--model", str(TOOL), "-o", folder]
    assert main(["export", file, *options]) == 0
    assert "7 nvfp4-pack-quantized" in capsys.readouterr().out
    assert read_checkpoint(folder).layers.keys() == read_checkpoint(again).layers.keys()


def test_a_broken_checkpoint_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "broken")
    edit_tensors(lambda t: t.__delitem__("model.q_proj.weight_scale"))(folder)
    assert main(["import", str(folder), "-o", str(tmp_path / "model.fpc")]) == 1
    assert "tensor 'model.q_proj.weight_scale': it is missing" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "model.fpc")]) == 1
    assert main(["import", str(folder), "-o", str(tmp_path / "no" / "model.fpc")]) == 1
    assert not (tmp_path / "model.fpc").exists()
    capsys.readouterr()
    assert main(["import", str(TOOL), "-o", str(tmp_path)]) == 1
    assert "is a folder; give the name of a file" in capsys.readouterr().err
