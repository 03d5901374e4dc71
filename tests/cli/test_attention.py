"""``compile --attention``: its parts, what the command prints, and its errors."""

import json
import sys
from pathlib import Path

import pytest

from fpcompiler.cli.main import main
from fpcompiler.runtime.loading import load

MODELS = """
import torch
from torch import nn

class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 2, 8, 16))

    def forward(self, x, position):
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in parts)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        return nn.functional.scaled_dot_product_attention(q, self.keys, self.values)

class Fading(Cached):
    def forward(self, x, position):
        self.values.mul_(0.5)
        self.keys.index_copy_(2, position, x.unflatten(-1, (2, 16)).transpose(1, 2))
        return nn.functional.scaled_dot_product_attention(self.keys, self.keys, self.values)

def fading():
    return Fading().eval(), (torch.randn(1, 3, 32), torch.arange(3))

def cached():
    return Cached().eval(), (torch.randn(1, 3, 32), torch.arange(3))
"""

FP8 = "f8E4M3FN@token:f32"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cached_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cached_models", raising=False)


def compile_cached(*options: str) -> int:
    return main(["compile", "cached_models:cached", "-o", "m.fpc", *options])


def test_parts_are_named_and_the_cache_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_cached("--attention", f"qkv={FP8},weights={FP8},cache={FP8}") == 0
    assert "caches: 2 of 2 quantized, 2.0 KiB -> 640 B\n" in capsys.readouterr().out
    artifact = load("m.fpc").artifact
    assert "quantize-cache,quantize-attention{weights=" in artifact.pipeline
    assert main(["inspect", "m.fpc", "--json"]) == 0
    caches = json.loads(capsys.readouterr().out)["plan"]["caches"]
    assert [(row["name"], row["bytes_after"]) for row in caches] == [("keys", 320), ("values", 320)]


def test_one_operand_is_that_of_queries_keys_and_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compile_cached("--attention", FP8) == 0
    assert "caches" not in capsys.readouterr().out
    assert ",quantize-attention," in load("m.fpc").artifact.pipeline


@pytest.mark.filterwarnings("always:quantize-cache")
def test_a_cache_that_stays_as_it_is_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cached_models:fading", "-o", "m.fpc", "--attention", f"cache={FP8}"]
    assert main(["compile", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "caches: 1 of 2 quantized, 2.0 KiB -> 1.3 KiB" in out
    assert err.startswith("warning: quantize-cache: these buffers stay in high precision: values: ")


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_cached("--attention", f"kv={FP8}") == 1
    message = capsys.readouterr().err
    assert "there is no part 'kv'. Did you mean qkv?" in message
    assert not Path("m.fpc").exists()
