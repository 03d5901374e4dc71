"""``quantize-cache``: keys and values of earlier calls in few bits, and nothing else changes."""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

import fpcompiler
from fpcompiler.capture import capture
from fpcompiler.errors import NumericsError, PassError
from fpcompiler.huggingface import CachedDecoder
from fpcompiler.ir import import_program
from fpcompiler.operand import Operand
from fpcompiler.passes import parse_pipeline, run_pipeline
from tests.hf_models import hf_model
from tests.models import CachedAttention, token_ids

HEADS, TOKENS, WIDTH = 4, 32, 16
OPERANDS = [
    "f8E4M3FN@token:f32",
    "f6E2M3FN@token:f32",
    "f4E2M1FN@token:f32",
    "f6E3M2FN@block32:f8E8M0FNU",
    "f4E2M1FN@token:f32/block16:f8E4M3FN",
]
FP4 = "f4E2M1FN@token:f32"

Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def cached() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CachedAttention().eval()


def call(first: int, last: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(1, last - first, HEADS * WIDTH, generator=generator)
    return x, torch.arange(first, last)


@lru_cache
def exported() -> ExportedProgram:
    """Return the model as captured, which takes longer than to compile it."""
    return capture(cached(), call(0, 4)).exported


def compiled(attention: str, model: nn.Module | None = None) -> fpcompiler.CompiledModel:
    source = exported() if model is None else model
    return fpcompiler.compile(source, "w4a16", example_inputs=call(0, 4), attention=attention)


def decode(model: Callable[..., Tensor]) -> Tensor:
    """Return what a prompt of five tokens and six single tokens give."""
    steps = [(0, 5), *((i, i + 1) for i in range(5, 11))]
    return torch.cat([model(*call(*step)) for step in steps], 1)


def state_bytes(model: fpcompiler.CompiledModel) -> int:
    artifact = model.artifact
    return sum(artifact.tensors[key].nbytes for key in artifact.plan.state.values())


@pytest.mark.parametrize("operand", OPERANDS)
def test_decoding_gives_the_bits_of_quantization_in_front_of_attention(operand: str) -> None:
    stored = compiled(f"qkv={operand},cache={operand}")
    assert torch.equal(decode(stored), decode(compiled(operand)))
    bits = Operand.parse(operand).bits_per_value(WIDTH)
    assert state_bytes(stored) == 2 * HEADS * TOKENS * WIDTH * bits / 8


def test_without_the_cache_option_the_state_stays_as_it_was() -> None:
    plain = compiled("f8E4M3FN@token:f32")
    assert state_bytes(plain) == 2 * HEADS * TOKENS * WIDTH * 4
    assert plain.plan().caches == ()


def test_only_the_cache_is_quantized_if_nothing_else_is_asked_for() -> None:
    operations = [step.op for step in compiled(f"cache={FP4}").artifact.plan.steps]
    assert operations.count("fpc.quantize") == 2  # New keys and values, once each.
    assert operations.count("fpc.dequantize") == 2
    assert operations.count("fpc.pack") == operations.count("fpc.unpack") == 2


def test_weights_and_cache_go_together() -> None:
    weights = "f8E4M3FN@tensor:f32"
    stored = compiled(f"qkv={FP4},weights={weights},cache={FP4}")
    in_front = compiled(f"qkv={FP4},weights={weights}")
    assert torch.equal(decode(stored), decode(in_front))


def test_a_decoder_of_hugging_face_with_grouped_heads() -> None:
    decoder = CachedDecoder(hf_model("hf-llama"), max_seq=16)
    ids, position = token_ids(1, 9), torch.arange(9)
    program = capture(decoder, (ids[:, :4], position[:4])).exported
    texts = (f"qkv={FP4},cache={FP4}", FP4)
    stored, in_front = (fpcompiler.compile(program, "w4a16", attention=text) for text in texts)
    for part in (slice(0, 6), *(slice(i, i + 1) for i in range(6, 9))):
        assert torch.equal(*(model(ids[:, part], position[part]) for model in (stored, in_front)))
    assert state_bytes(stored) * 16 == state_bytes(in_front) * 3  # 16 values: 8 bytes and a scale.


def test_state_is_kept_between_calls_reset_saved_and_loaded(tmp_path: Path) -> None:
    stored = compiled(f"qkv={FP4},cache={FP4}")
    first = decode(stored)
    assert not torch.equal(stored(*call(4, 5)), compiled(f"cache={FP4}")(*call(4, 5)))
    stored.reset()
    assert torch.equal(decode(stored), first)
    stored.save(tmp_path / "m.fpc")
    loaded = fpcompiler.load(tmp_path / "m.fpc")
    assert torch.equal(decode(loaded), first)
    assert loaded.verify().ok
    assert {loaded.artifact.tensors[k].dtype for k in loaded.artifact.plan.state.values()} == {
        torch.uint8,
        torch.float32,
    }


def test_what_the_buffer_held_at_first_is_quantized_too() -> None:
    model = cached()
    model.k_cache.copy_(torch.linspace(-1, 1, model.k_cache.numel()).view_as(model.k_cache))
    stored, in_front = (compiled(text, model) for text in (f"qkv={FP4},cache={FP4}", FP4))
    x, _ = call(0, 2)
    position = torch.tensor([20, 25])
    assert torch.equal(stored(x, position), in_front(x, position))


def test_counts_tell_the_bytes() -> None:
    pipeline = parse_pipeline('normalize,insert-quantize,quantize-cache{operand="f6E2M3FN"}')
    *_, result = run_pipeline(import_program(exported()), pipeline)
    values = 2 * HEADS * TOKENS * WIDTH
    counts = {"cache bytes before": values * 4, "cache bytes after": values * 3 // 4}
    assert result.statistics == {"caches quantized": 2, **counts}


def test_the_plan_says_what_a_cache_takes() -> None:
    table = compiled("cache=f8E4M3FN@token:f32").plan()
    names = [(row.name, row.shape, row.weight, row.quantized) for row in table.caches]
    shape = (1, HEADS, TOKENS, WIDTH)
    assert names == [(f"{kind}_cache", shape, "f8E4M3FN@token:f32", True) for kind in "kv"]
    sizes = [(row.bytes_before, row.bytes_after) for row in table.caches]
    assert sizes == [(TOKENS * HEADS * WIDTH * 4, TOKENS * HEADS * (WIDTH + 4))] * 2
    assert table.cache_text == "caches: 2 of 2 quantized, 16.0 KiB -> 5.0 KiB"
    assert "caches: 2 of 2 quantized, 16.0 KiB -> 5.0 KiB, not in the sums" in str(table)
    assert len(table.to_json()["caches"]) == 2
    assert [row.name for row in table.rows] == ["qkv", "out"]


class Decoder(nn.Module):
    """Attention over a cache that is written in a way of its own."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, TOKENS, WIDTH))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in parts)
        self.calls.add_(1)
        keys, values = self.write(self.keys, k, position), self.write(self.values, v, position)
        return functional.scaled_dot_product_attention(q, keys, values)


def by_index(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, position] = new
    return cache


def by_head_and_index(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache.index_put_((torch.tensor([[0]]), torch.arange(HEADS)[:, None], position[None]), new[0])
    return cache


def by_slice(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, 3 : 3 + new.shape[2]] = new
    return cache


def by_rolling(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache.copy_(torch.cat([cache[:, :, new.shape[2] :], new], 2))
    return cache


def read_before_and_after(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    before = cache.clone()
    cache.index_copy_(2, position, new)
    return torch.cat([before, cache], 2)


def fading(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache.mul_(0.9)
    return cache


def adding(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    rows = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), position[:1]
    cache.index_put_(rows, new[0, :1, 0], accumulate=True)
    return cache


def by_channel(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache[:, :, :, 0] = new[:, :, :1, 0]
    return cache


def through_a_function(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    cache.index_copy_(2, position, new)
    return torch.tanh(cache)


def decoder(write: Write) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(write).eval()


def fixed(attention: str, model: nn.Module) -> fpcompiler.CompiledModel:
    return fpcompiler.compile(
        model, "w4a16", example_inputs=call(0, 2), attention=attention, dynamic=None
    )


@pytest.mark.parametrize(
    "write", [by_index, by_head_and_index, by_slice, by_rolling, read_before_and_after]
)
def test_ways_to_write_a_cache(write: Write) -> None:
    stored = fixed(f"qkv={FP4},cache={FP4}", decoder(write))
    in_front = fixed(FP4, decoder(write))
    for first in (0, 2, 1):
        inputs = call(first, first + 2)
        assert torch.equal(stored(*inputs), in_front(*inputs))
    assert [row.quantized for row in stored.plan().caches] == [True, True]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (fading, "keys: what is stored comes from its contents through mul"),
        (adding, "keys: index_put adds to it, or chooses single channels"),
        (by_channel, "keys: select_scatter works along its channels"),
        (through_a_function, "keys: no attention reads it as it is"),
    ],
)
def test_without_a_cache_that_can_be_stored_the_option_is_refused(
    write: Write, reason: str
) -> None:
    with pytest.raises(PassError, match=re.escape(reason)) as caught:
        fixed(f"cache={FP4}", decoder(write))
    assert "Leave cache= out of the option for attention." in str(caught.value)


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(PassError, match="no buffer of keys and values"):
        fpcompiler.compile(
            nn.Linear(4, 4), "w4a16", example_inputs=(torch.ones(1, 4),), attention=f"cache={FP4}"
        )


def test_one_cache_that_is_not_understood_stays_and_is_named() -> None:
    def only_keys(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
        return (by_index if cache is model.keys else fading)(cache, new, position)

    model = decoder(only_keys)
    with pytest.warns(UserWarning, match="these buffers stay in high precision: values: what is"):
        stored = fixed(f"cache={FP4}", model)
    keys, values = sorted(stored.plan().caches, key=lambda row: row.name)
    assert keys.quantized
    assert not values.quantized
    assert values.reason == "what is stored comes from its contents through mul.Scalar"
    assert values.bytes_after == values.bytes_before == HEADS * TOKENS * WIDTH * 4


def test_values_that_cannot_be_stored_are_refused() -> None:
    x, position = call(0, 4)
    x[0, 1, 3] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        compiled(f"cache={FP4}")(x, position)
