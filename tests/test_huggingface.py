"""The KV cache in buffers: the same logits as without a cache, or a refusal."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fpcompiler.capture import capture
from fpcompiler.errors import CaptureError, OptionError
from fpcompiler.huggingface import CachedDecoder, without_bars
from tests.hf_models import hf_model
from tests.models import Llama, token_ids

LENGTH = 20

SUPPORTED = ["llama", "mistral", "qwen3", "gemma", "gemma2", "gpt2", "opt", "mixtral"]


def decode(decoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a prompt, a second prompt and then one token at a time."""
    position = torch.arange(ids.shape[1])
    calls = [slice(0, 9), slice(9, 12), *(slice(i, i + 1) for i in range(12, ids.shape[1]))]
    with torch.no_grad():
        return torch.cat([decoder(ids[:, call], position[call]) for call in calls], 1)


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_equal_those_without_a_cache(name: str) -> None:
    # Longer than the windows of Mistral and Gemma 2, which are 8.
    model, ids = hf_model(f"hf-{name}"), token_ids(2, LENGTH)
    decoder = CachedDecoder(model, max_batch=2, max_seq=32)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(decode(decoder, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "mistral",
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("qwen3", marks=pytest.mark.slow),
        pytest.param("gemma", marks=pytest.mark.slow),
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("opt", marks=pytest.mark.slow),
        pytest.param("mixtral", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_prompts_and_single_tokens(name: str) -> None:
    model, ids = hf_model(f"hf-{name}"), token_ids(1, LENGTH)
    decoder = CachedDecoder(model, max_seq=32)
    program = capture(decoder, (ids[:, :1], torch.arange(1)))
    assert len(program.state) == 4
    assert [symbol.min for symbol in program.symbols.values()] == [1]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    got = decode(program.exported.module(), ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_the_shape_and_dtype_of_the_model(attention: str, dtype: torch.dtype) -> None:
    model = hf_model("hf-qwen3", attn_implementation=attention, head_dim=8).to(dtype)
    decoder = CachedDecoder(model, max_batch=3, max_seq=16)
    caches = dict(decoder.named_buffers(recurse=False))
    assert {tuple(c.shape) for c in caches.values()} == {(3, 2, 16, 8)}
    assert {c.dtype for c in caches.values()} == {dtype}
    assert not any(c.any() for c in caches.values())
    assert not {name for name in decoder.state_dict() if "cache" in name}


def test_reset_and_a_second_text() -> None:
    decoder = CachedDecoder(hf_model("hf-gpt2"), max_batch=2, max_seq=32)
    ids = token_ids(2, LENGTH)
    first = decode(decoder, ids)
    again = decode(decoder, ids)
    assert torch.equal(again, first)
    decoder.reset()
    assert not any(buffer.any() for buffer in decoder.buffers(recurse=False))


def test_another_batch_than_the_cache_has_is_an_error() -> None:
    decoder = CachedDecoder(hf_model("hf-llama"), max_batch=2, max_seq=32)
    for batch in (1, 3):
        with pytest.raises(
            RuntimeError, match=f"input_ids has {batch} texts, and the cache is for 2"
        ):
            decoder(token_ids(batch, 4), torch.arange(4))


def test_a_longer_text_than_the_cache_is_an_error() -> None:
    decoder = CachedDecoder(hf_model("hf-gpt2"), max_seq=4)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        decoder(token_ids(1, 5), torch.arange(5))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hf-whisper", "it has an encoder"),
        ("hf-bert", "it failed on a few tokens"),
        ("hf-vit", "is no language model of transformers"),
    ],
)
def test_models_of_another_kind_are_refused(name: str, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as caught:
        CachedDecoder(hf_model(name), max_seq=32)
    assert "Fix: " in str(caught.value)


def test_own_modules_and_training_mode_are_refused() -> None:
    with pytest.raises(CaptureError, match="Llama is no language model of transformers"):
        CachedDecoder(Llama().eval())
    with pytest.raises(CaptureError, match=r"call model.eval\(\)"):
        CachedDecoder(hf_model("hf-gpt2").train())


def test_layer_types_without_keys_and_values_are_refused() -> None:
    model = hf_model("hf-qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(CaptureError, match="layers of the types linear_attention"):
        CachedDecoder(model)


def test_other_attention_kernels_are_refused() -> None:
    model = hf_model("hf-llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(CaptureError, match="attn_implementation='sdpa'"):
        CachedDecoder(model)


@pytest.mark.parametrize(
    ("ignored", "reason"),
    [
        ("attention_mask", "it failed on a few tokens"),
        ("position_ids", "with a cache its logits differ"),
    ],
)
def test_a_model_that_ignores_an_argument_is_refused(ignored: str, reason: str) -> None:
    model = hf_model("hf-llama")
    forward = model.forward
    model.forward = lambda **kwargs: forward(**{**kwargs, ignored: None})
    with pytest.raises(CaptureError, match=reason):
        CachedDecoder(model, max_seq=32)


def test_a_window_that_the_model_does_not_have_is_noticed() -> None:
    model = hf_model("hf-llama")
    model.config.sliding_window = 8
    with pytest.raises(CaptureError, match="with a cache its logits differ"):
        CachedDecoder(model, max_seq=32)
    assert isinstance(CachedDecoder(model, max_seq=8), nn.Module)


@pytest.mark.parametrize("sizes", [{"max_batch": 0}, {"max_seq": 0}, {"max_seq": 129}])
def test_sizes_that_make_no_sense(sizes: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=r"at least 1|made for 128 positions"):
        CachedDecoder(hf_model("hf-gpt2"), **sizes)


def test_neither_module_imports_transformers() -> None:
    code = (
        "import sys, fpcompiler.capture, fpcompiler.huggingface; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_logits_of_the_last_tokens_only() -> None:
    model = hf_model("hf-llama")
    whole, last = (CachedDecoder(model, max_seq=32, last_logits=n) for n in (0, 1))
    for ids, position in ((token_ids(1, 9), torch.arange(9)), (token_ids(1, 1), torch.tensor([9]))):
        with torch.no_grad():
            ends = last(ids, position), whole(ids, position)[:, -1:]
            torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wanted", [-1, 1])
def test_last_logits_that_cannot_be(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_model("hf-gpt2")

    def forward(input_ids: Any) -> None: ...

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises((CaptureError, OptionError), match="last_logits"):
        CachedDecoder(model, max_seq=32, last_logits=wanted)


def test_bars_of_transformers_are_off_meanwhile_and_then_as_before() -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    with without_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == before
