"""The registry of formats, and the command."""

from __future__ import annotations

import importlib
import inspect
import json
import zipfile

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


def test_a_name_is_that_of_the_kind_of_file(tiny, tmp_path) -> None:
    wrong = [
        ("onnx-portable", "m.txt"),
        ("onnx-standard", "m"),
        ("pt2", "m.onnx"),
        ("aoti", "m.so"),
    ]
    for format, name in wrong:
        suffix = EXPORT_FORMATS[format].suffix
        with pytest.raises(
            OptionError, match=rf"{name} does not end with \{suffix}, .*Write m\{suffix}\."
        ):
            tiny.export(tmp_path / name, format)
    for name in ("m.onnx", "m.pt2", "m.fpc", "m.txt", "m.safetensors"):
        with pytest.raises(OptionError, match=r"is written as a folder, and .*Write m\."):
            tiny.export(tmp_path / name, "compressed-tensors")
    assert not [*tmp_path.iterdir()]


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


def test_a_file_without_recorded_calls_is_not_verified(tiny, tmp_path, capsys) -> None:
    file = tmp_path / "model.onnx"
    tiny.export(file, "onnx-portable")
    file.with_name("model.onnx.golden.safetensors").unlink()
    assert main(["verify", str(file), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["rows"][0]["detail"].startswith(
        "nothing was compared: there is no model.onnx.golden.safetensors beside the file."
    )


@pytest.mark.parametrize("format", ["onnx-portable", "onnx-standard"])
def test_inspect_shows_what_an_onnx_file_is(tiny, tmp_path, capsys, format) -> None:
    file = str(tmp_path / "model.onnx")
    tiny.export(file, format)
    assert main(["inspect", file, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["style"], facts["recorded_calls"]) == (format.removeprefix("onnx-"), 1)
    assert facts["inputs"] == [["input", "float32", ["batch", 64]]]
    assert [row["name"] for row in facts["plan"]["rows"]] == ["0"]
    assert main(["inspect", file]) == 0
    assert "batch x 64" in capsys.readouterr().out


def test_what_commands_do_not_take_is_said(tiny, tmp_path, capsys) -> None:
    file = tmp_path / "model.onnx"
    tiny.export(file, "onnx-portable")
    assert main(["bench", str(file)]) == 1
    assert "bench measures artifacts, and" in capsys.readouterr().err
    file.write_bytes(b"no protobuf")
    assert main(["inspect", str(file)]) == 1
    assert "cannot be read as ONNX" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as package:
        package.writestr("archive/data/aotinductor/model/a.so", b"")
    assert main(["verify", str(tmp_path / "model.pt2")]) == 1
    assert "looks like a package of AOTInductor" in capsys.readouterr().err


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
    assert "--strict is for artifacts" in capsys.readouterr().err
