"""keep-if-slower: which layers it leaves in 16 bits, and what it says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from fpcompiler import ir, passes
from fpcompiler.capture import capture, shapes_of_call
from fpcompiler.errors import PassError
from fpcompiler.ir.printer import print_program
from fpcompiler.operand import Operand
from fpcompiler.passes.keep_if_slower import KEPT, QUANTIZED, ROWS, mark_rows, needs_rows
from fpcompiler.runtime.costs import LayerCall, Prediction, predict
from tests.models import CachedAttention, SharedBlock
from tests.programs import count, import_named, kept_reasons, leaves_of

BF16 = torch.bfloat16


class Sizes(nn.Module):
    """A small layer and a large one, and a head."""

    def __init__(self, small: int = 256, large: int = 4096) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(small, small), nn.Linear(small, large)
        self.wide = nn.Linear(large, large, bias=False)
        self.lm_head = nn.Linear(large, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.wide(torch.tanh(self.large(torch.tanh(self.small(x))))))


def marked(model: nn.Module, *args: Tensor, rows: Mapping[str, int] | None = None) -> ir.Program:
    """Return a program whose layers have the rows of a call, or others by node."""
    captured = capture(model.eval(), args)
    program = import_named(captured)
    shapes: dict[str, Sequence[int]] = dict(
        shapes_of_call(captured, leaves_of(captured, (args, {})))
    )
    shapes |= {name: (m, 1) for name, m in (rows or {}).items()}
    mark_rows(program, shapes)
    return program


def run(program: ir.Program, scheme: str, gpus: str = "sm_90a") -> passes.PassResult:
    """Run the pass and what follows it; return what the pass did."""
    kept = f'keep-if-slower{{scheme="{scheme}" gpus="{gpus}"}}'
    pipeline = f'cse,normalize,fold-constants,{kept},insert-quantize{{scheme="{scheme}"}},cse'
    results = passes.run_pipeline(program, passes.parse_pipeline(pipeline))
    return results[3]


def test_small_layers_are_kept_and_large_ones_quantized() -> None:
    program = marked(Sizes().to(BF16), torch.zeros(1, 2, 256, dtype=BF16))
    result = run(program, "nvfp4")
    reasons = kept_reasons(program)
    assert {*reasons} == {"small", "large", "lm_head"}
    assert re.fullmatch(
        r"slower than bf16 if quantized: 0\.\d\dx with 2 tokens on sm_90a \(predicted\); "
        r"keep_if_slower=False quantizes it and saves 72% of its memory",
        reasons["small"],
    )
    assert reasons["lm_head"] == "the scheme keeps it in high precision"
    assert count(program, "fpq.linear") == 1
    assert (result.statistics[KEPT], result.statistics[QUANTIZED]) == (2, 1)
    assert "2 layers stay in 16 bits" in result.report
    assert re.search(r"\| 1 \| 256 x 256 \| 0\.\d\dx with 2 tokens on sm_90a \|", result.report)
    assert "sm_90a: predicted from times of layers with" in result.report


@pytest.mark.parametrize(("tokens", "kept"), [(1, False), (2048, True)])
def test_the_tokens_of_the_example_call_decide(tokens: int, kept: bool) -> None:
    program = marked(nn.Linear(4096, 4096).to(BF16), torch.zeros(tokens, 4096, dtype=BF16))
    run(program, "nvfp4")
    assert bool(kept_reasons(program)) == kept


def test_a_model_with_a_cache_gets_one_token_at_a_time_too() -> None:
    plain = marked(nn.Linear(2048, 6144).to(BF16), torch.zeros(2048, 2048, dtype=BF16))
    assert run(plain, "w4a6").statistics == {KEPT: 1}
    model = CachedAttention(width=2048, heads=16).to(BF16)
    call = torch.zeros(1, 4, 2048, dtype=BF16), torch.arange(4)
    program = marked(model, *call, rows={"linear": 2048, "linear_1": 2048})
    assert run(program, "w4a6").statistics == {QUANTIZED: 2}  # one token gains
    program = marked(CachedAttention(width=64).to(BF16), call[0][..., :64], call[1])
    run(program, "nvfp4")
    both = r": 0\.\d\dx with 4 tokens on sm_90a, 0\.\d\dx with 1 token on sm_90a \("
    assert re.search(both, kept_reasons(program)["out"])


def test_models_in_fp32_would_be_slower_still_if_kept() -> None:
    program = marked(Sizes(), torch.zeros(32, 256))
    assert run(program, "w4a6-row").statistics == {"layers not in 16 bits": 3}
    assert {*kept_reasons(program)} == {"lm_head"}


def test_what_is_not_predicted_is_quantized() -> None:
    conv = nn.Conv2d(3, 8, 4, stride=4).to(BF16)
    program = marked(conv, torch.zeros(1, 3, 32, 32, dtype=BF16))
    assert run(program, "w4a6-row").statistics == {"convolutions, not predicted": 1}
    program = marked(nn.Linear(64, 64).to(BF16), torch.zeros(2, 64, dtype=BF16))
    assert run(program, "mxfp8").statistics == {"layers without a prediction": 1}
    program = marked(nn.Linear(64, 64).to(BF16), torch.zeros(2, 64, dtype=BF16))
    for op in program.operations("torch.aten.linear"):
        del op.attributes[ROWS]
    assert run(program, "w4a6").statistics == {"layers whose tokens are not known": 1}
    assert not kept_reasons(program)


class Three(nn.Module):
    """Layers that read one input, and one that reads it without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.gate = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in (self.q, self.k, self.v, self.gate)], -1)


def test_layers_that_read_the_same_input_are_judged_as_one() -> None:
    program = marked(Three().to(BF16), torch.zeros(1, 64, dtype=BF16))
    result = run(program, "w4a6-row")
    weight, activation = Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32")
    alone = predict("sm_90a", LayerCall(1, 32, 64, weight, activation))
    joined = predict("sm_90a", LayerCall(1, 64, 64, weight, activation, (64, 32, 32)))
    assert isinstance(alone, Prediction)
    assert isinstance(joined, Prediction)
    assert (alone.is_slower, joined.is_slower) == (True, False)
    assert result.statistics == {KEPT: 1, QUANTIZED: 3}
    assert {*kept_reasons(program)} == {"gate"}


def test_a_layer_that_runs_twice_is_kept_as_a_whole_or_not_at_all() -> None:
    x = torch.zeros(1, 4, 64, dtype=BF16)
    program = marked(SharedBlock().to(BF16), x)
    run(program, "nvfp4")
    assert count(program, "fpq.linear") == 0
    shared = SharedBlock(1024).to(BF16)
    wide = torch.zeros(1, 4, 1024, dtype=BF16)
    nodes = [
        node.name for node in capture(shared.eval(), (wide,)).exported.graph.nodes
        if "linear" in node.name
    ]  # fmt: skip
    few, many = (marked(shared, wide, rows=dict.fromkeys(nodes, m)) for m in (1, 4096))
    mixed = marked(shared, wide, rows={**dict.fromkeys(nodes, 4096), **dict.fromkeys(nodes[:4], 1)})
    for program in (few, many, mixed):
        run(program, "w4a16; *: w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=none")
    kept = [{*kept_reasons(program)} for program in (few, many, mixed)]
    assert kept[0] == set()
    twice = kept[1] - {"between"}
    assert twice  # with many tokens alone they are kept
    assert not twice & kept[2]  # with few as well they are not


def test_an_estimate_is_called_one() -> None:
    program = marked(nn.Linear(4096, 64).to(BF16), torch.zeros(8192, 4096, dtype=BF16))
    run(program, "w4a4", "sm_100a,sm_120a")
    (reason,) = kept_reasons(program).values()
    assert "x with 8,192 tokens on sm_100a, " in reason
    assert " on sm_120a (estimated, never measured);" in reason


def test_all_gpus_must_be_slower() -> None:
    linear, x = nn.Linear(1152, 1152).to(BF16), torch.zeros(512, 1152, dtype=BF16)
    only, both = marked(linear, x), marked(linear, x)
    run(only, "w4a6")
    run(both, "w4a6", "sm_90a,sm_100a")
    assert (len(kept_reasons(only)), len(kept_reasons(both))) == (1, 0)


def test_a_dump_can_be_run_again() -> None:
    program = marked(Sizes().to(BF16), torch.zeros(2, 256, dtype=BF16))
    passes.run_pipeline(program, passes.parse_pipeline("normalize"))
    again = passes.opt(print_program(program), "keep-if-slower{scheme=nvfp4}")
    assert again.count("x with 2 tokens on sm_90a (predicted)") == 2
    assert again.count("fpq.kept") == 2


def test_its_text_is_read_back_and_wrong_gpus_are_refused() -> None:
    text = "keep-if-slower{scheme=w4a16 gpus=sm_100a}"
    parsed = passes.parse_pipeline(text)
    assert passes.pipeline_text(parsed) == text
    assert needs_rows(parsed)
    assert not needs_rows(passes.default_pipeline("w4a6"))
    assert needs_rows(passes.default_pipeline("w4a6", keep_on="sm_90a"))
    with pytest.raises(PassError, match="there are no times for 'cpu'; there are for sm_90a, sm_1"):
        run(marked(nn.Linear(8, 8), torch.zeros(1, 8)), "w4a6", "cpu")


def test_what_user_sees_if_nothing_is_left() -> None:
    program = marked(nn.Linear(64, 64).to(BF16), torch.zeros(2, 64, dtype=BF16))
    pipeline = passes.parse_pipeline(
        "cse,normalize,keep-if-slower{scheme=nvfp4},insert-quantize{scheme=nvfp4}"
    )
    text = passes.all_kept(passes.run_pipeline(program, pipeline))
    assert text.startswith("keep_if_slower: no layer was quantized. 1 that the scheme names")
    assert "keep_if_slower=False (--no-keep-if-slower) quantizes them" in text
    mixed = marked(Sizes().to(BF16), torch.zeros(2, 256, dtype=BF16))
    assert passes.all_kept(passes.run_pipeline(mixed, pipeline)) == ""
    skipped = marked(nn.Linear(64, 64).to(BF16), torch.zeros(2, 64, dtype=BF16))
    none = passes.parse_pipeline('normalize,insert-quantize{scheme="w4a6; *: skip"}')
    assert passes.all_kept(passes.run_pipeline(skipped, none)) == ""
