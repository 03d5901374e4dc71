"""Tensor files and the sources of models."""

import numpy as np
import pytest
import safetensors.torch
import torch

from fpcompiler.cli.source import load_source
from fpcompiler.cli.tensors import Inputs, named_tensors, read_inputs, write_tensors
from fpcompiler.errors import OptionError


def test_numbered_tensors_are_positional_and_others_go_by_name(tmp_path) -> None:
    path = tmp_path / "in.safetensors"
    tensors = {"1": torch.ones(2), "arg0": torch.zeros(3), "mask": torch.ones(1, dtype=torch.bool)}
    safetensors.torch.save_file(tensors, path)
    inputs = read_inputs(str(path))
    assert [tuple(t.shape) for t in inputs.args] == [(3,), (2,)]
    assert {*inputs.kwargs} == {"mask"}


def test_numpy_files(tmp_path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, np.arange(3), np.ones((2, 2), np.float32), extra=np.zeros(1))
    inputs = read_inputs(str(path))
    assert inputs.args[0].tolist() == [0, 1, 2]
    assert inputs.args[1].dtype is torch.float32
    assert {*inputs.kwargs} == {"extra"}


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_results_round_trip_with_the_names_of_their_nesting(tmp_path, suffix) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    value = {"logits": base, "past": [(base.T, base[0]), None], "n": 3}
    path = str(tmp_path / f"out.{suffix}")
    names = write_tensors(path, value)
    assert names == ["logits", "past.0.0", "past.0.1"]
    read = read_inputs(path).kwargs
    assert all(torch.equal(read[name], t) for name, t in named_tensors(value))
    assert write_tensors(path, base) == ["output"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "there is no file"),
        ("in.pt", b"", "end with .safetensors or .npz"),
        ("in.npz", b"not a zip", "does not read as .npz"),
        ("in.safetensors", b"\xff" * 16, "does not read as .safetensors"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_inputs(str(path))


def test_pickles_in_numpy_files_are_refused(tmp_path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(OptionError, match="does not read as"):
        read_inputs(str(path))


def test_gaps_in_the_numbers_and_bfloat16_in_numpy_are_refused(tmp_path) -> None:
    path = tmp_path / "in.safetensors"
    safetensors.torch.save_file({"0": torch.ones(1), "2": torch.ones(1)}, path)
    with pytest.raises(OptionError, match="do not count from 0"):
        read_inputs(str(path))
    with pytest.raises(OptionError, match=r"use \.safetensors"):
        write_tensors(str(tmp_path / "o.npz"), torch.ones(1, dtype=torch.bfloat16))


MODULE = """
import torch
def pair(): return torch.nn.Linear(4, 2), torch.ones(1, 4)
def named(): return torch.nn.Linear(4, 2), {"input": torch.ones(1, 4)}
def alone(): return torch.nn.Linear(4, 2)
constant = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "some_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("module")
def test_functions_of_the_current_folder_are_found() -> None:
    source = load_source("some_models:pair", None)
    assert isinstance(source.model, torch.nn.Linear)
    assert tuple(source.inputs.args[0].shape) == (1, 4)
    assert {*load_source("some_models:named", None).inputs.kwargs} == {"input"}
    given = Inputs((torch.zeros(3, 4),))
    assert load_source("some_models:pair", given).inputs is given


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some_models:missing", "has no function 'missing'"),
        ("some_models:constant", "has no function 'constant'"),
        ("some_models:alone", r"must return \(model, example_inputs\)"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("something", "is no source of a model"),
        ("missing.pt2", "there is no file missing.pt2"),
        ("some_models.py", "is no source of a model"),
        (".", "has no config.json"),
    ],
)
def test_sources_that_are_none(text, message) -> None:
    with pytest.raises(OptionError, match=message):
        load_source(text, None)


def test_an_exported_archive_brings_its_example(tmp_path) -> None:
    path = tmp_path / "m.pt2"
    x = torch.ones(2, 4)
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), (x,)), path)
    source = load_source(str(path), None)
    assert torch.equal(source.inputs.args[0], x)


def test_files_that_are_no_exported_archive(tmp_path) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(OptionError, match="not even a zip file"):
        load_source(str(path), None)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(OptionError, match=r"no archive of torch\.export\.save"):
        load_source(str(path), None)


def test_a_hugging_face_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    source = load_source(str(tmp_path), None)
    assert type(source.model).__name__ == "LlamaForCausalLM"
    assert not source.model.training
    assert {*source.inputs.kwargs} == {"input_ids"}
    config_file = tmp_path / "config.json"
    config_file.write_text(config_file.read_text().replace("LlamaForCausalLM", "NoSuchModel"))
    with pytest.raises(OptionError, match="no architecture"):
        load_source(str(tmp_path), None)
