"""The registry of formats, and the command."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpcompiler.cli.main import main
from fpcompiler.errors import OptionError
from fpcompiler.interop.formats import EXPORT_FORMATS, Exported, export


@pytest.mark.parametrize("row", EXPORT_FORMATS.values(), ids=lambda row: row.name)
def test_a_writer_takes_the_options_of_its_format(row) -> None:
    writer = importlib.import_module(row.module).write
    artifact, path, *options = inspect.signature(writer).parameters
    assert (artifact, path) == ("artifact", "path")
    assert {*options} == {*row.options, *row.fixed}


def test_an_unknown_format_or_option_is_refused_with_what_there_is(tiny, tmp_path) -> None:
    with pytest.raises(OptionError) as caught:
        export(tiny.artifact, tmp_path / "x", "onnx-portabel")
    assert str(caught.value) == (
        "there is no export format 'onnx-portabel'. Did you mean 'onnx-portable'? Formats: "
        f"{', '.join(EXPORT_FORMATS)}."
    )
    with pytest.raises(OptionError, match="pt2 has no option 'opset'; it takes none"):
        tiny.export(tmp_path / "x", "pt2", opset=18)
    with pytest.raises(OptionError, match="'opse'; it takes external_data, opset"):
        tiny.export(tmp_path / "x", "onnx-portable", opse=18)
    with pytest.raises(OptionError, match="the path must be that of a file or folder"):
        tiny.export(3, "pt2")


def test_options_that_are_none_are_left_out(tiny, tmp_path) -> None:
    assert isinstance(tiny.export(tmp_path / "x.pt2", "pt2", opset=None), Exported)


def test_the_command_exports_and_others_run_what_it_wrote(tiny, tmp_path, capsys) -> None:
    artifact, file = str(tmp_path / "model.fpc"), str(tmp_path / "model.onnx")
    tiny.save(artifact)
    command = ["export", artifact, "--format", "onnx-portable", "-o", file]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [*facts["files"]] == [file, f"{file}.golden.safetensors"]
    assert (facts["opset"], facts["quantized_weights"]) == (18, {"UINT8": 1})
    assert main(["verify", file]) == 0
    assert "bit-equal" in capsys.readouterr().out
    x = torch.randn(5, 64)
    save_file({"0": x}, tmp_path / "in.safetensors")
    names = ["--inputs", str(tmp_path / "in.safetensors"), "--output"]
    for source, result in ((file, "a.safetensors"), (artifact, "b.safetensors")):
        assert main(["run", source, *names, str(tmp_path / result)]) == 0
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert [*a] == [*b]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_says_what_is_wrong(tiny, tmp_path, capsys) -> None:
    artifact = str(tmp_path / "model.fpc")
    tiny.save(artifact)
    assert main(["export", artifact, "--format", "onnx", "-o", "x"]) == 1
    assert "there is no export format 'onnx'" in capsys.readouterr().err
    assert main(["export", artifact, "--format", "pt2", "-o", artifact]) == 1
    assert "model.fpc is the artifact itself" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.onnx"), "--random"]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.onnx"), "--random", "--strict"]) == 1
    assert "--strict is about kernels of an artifact" in capsys.readouterr().err
