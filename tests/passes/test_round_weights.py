"""``round-weights``: roundings of blocks are learned, whatever scales and folds there are."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler import ir
from fpcompiler.calibration import Calibration
from fpcompiler.capture import CapturedProgram, capture
from fpcompiler.cli.main import main
from fpcompiler.errors import PassError
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.passes import PASSES, PassResult, parse_pipeline, run_pipeline
from fpcompiler.passes.base import pass_text
from tests.calibration.runs import CPU, program_for
from tests.models import normal
from tests.numerics.adaround.problems import correlated
from tests.passes.test_gptq import stored
from tests.programs import evaluate, quantized

WIDTH = 32


class Block(nn.Module):
    """Attention of one head and a feed-forward, both with a norm before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part[:, None] for part in self.qkv(self.norm1(x)).chunk(3, -1)]
        x = x + self.out(functional.scaled_dot_product_attention(*parts)[:, 0])
        return x + self.down(functional.relu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval()


def tokens(seed: int, count: int = 4) -> Tensor:
    return correlated(count * 12, WIDTH, seed).view(count, 12, WIDTH)


BATCHES = [(tokens(10 * seed),) for seed in range(4)]
FRESH = tokens(500, 16)
LEARN = "round-weights{iterations=30}"


def calibrated(
    program: ir.Program, pipeline: str, batches: Any = BATCHES, **options: Any
) -> tuple[PassResult, ...]:
    calibration = Calibration(batches, device=CPU, **options)
    return run_pipeline(program, parse_pipeline(pipeline), calibration=calibration)


@functools.cache
def _captured() -> CapturedProgram:
    return capture(model(), BATCHES[0])


def small(scheme: str) -> ir.Program:
    """Return the model as a program at stage quantized; it is captured once."""
    return program_for(_captured(), scheme)


def error(program: ir.Program) -> float:
    (output,) = evaluate(program, FRESH)
    with torch.no_grad():
        wanted = model()(FRESH)
    return float((output - wanted).square().mean())


def notes(program: ir.Program) -> dict[str, str]:
    return {
        text_of(op.attributes["layer"]): text_of(op.attributes["fpq.note"])
        for op in program.operations("fpq.linear")
        if "fpq.note" in op.attributes
    }


SCHEMES = {
    "row": "w=f4E2M1FN@row:f32,a=f6E2M3FN@token:f32,skip=none",
    "blocks": "w4a6,skip=none",
    "weights alone": "w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=none,skip=none",
    "nvfp4": "nvfp4,skip=none",
    "groups": "w=f4E3M0FN@block128:f32,a=f6E2M3FN@token:f32,skip=none",
}
BEFORE = {
    "searched": "search-formats",
    "shifted": "preshift{rho=search limit=15}",
    "rotated": "rotate{weights_too=true}",
    "smoothed": "smooth",
    "attention": "quantize-attention",
}
CASES = {
    **{name: (scheme, "") for name, scheme in SCHEMES.items()},
    **{name: (SCHEMES["row"], before) for name, before in BEFORE.items()},
    "nvfp4 searched": ("nvfp4,skip=none", "search-formats"),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_better_than_rounded_to_nearest(name: str) -> None:
    scheme, before = CASES[name]
    program = small(scheme)
    if before:
        calibrated(program, before)
    nearest = program.clone()
    *_, result, _ = calibrated(program, f"{LEARN},quantize-weights")
    calibrated(nearest, "quantize-weights")
    ours, theirs = codes_of(program), codes_of(nearest)
    assert ours.keys() == theirs.keys()
    assert all(not torch.equal(ours[layer], theirs[layer]) for layer in ours)
    assert result.statistics["roundings learned: blocks"] == 3
    assert result.statistics["weights quantized"] == 9
    assert result.statistics["iterations"] > 50
    ratios = [re.search(r"output error of .* (0\.\d\d) of rtn", n) for n in notes(program).values()]
    assert len(ratios) == 9
    assert all(ratio is not None and float(ratio[1]) < 1 for ratio in ratios)
    # On data that nothing was learned from.
    assert error(program) < 0.9 * error(nearest)


def codes_of(program: ir.Program) -> dict[str, Tensor]:
    """Return the codes of the weights."""
    return {key: value for key, value in program.weights.items() if key.endswith(".codes")}


def scales_of(program: ir.Program) -> dict[str, Tensor]:
    return {key: value for key, value in program.weights.items() if "scale" in key}


def test_each_value_is_one_of_its_neighbours_with_the_scales_there_were() -> None:
    program = small(SCHEMES["row"])
    calibrated(program, "search-formats{formats=given}")
    scales = scales_of(program)
    calibrated(program, f"{LEARN},quantize-weights")
    after = scales_of(program)
    assert all(torch.equal(after[name], scale) for name, scale in scales.items())
    assert len(scales) == 9
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-grid.flip(0), grid[1:]])
    values = stored(program)
    for layer, value in values.items():
        own = [s for name, s in after.items() if name.startswith(f"{layer}.weight")]
        assert len(own) == 2  # of the search, and as it is stored again
        assert torch.equal(*own)
        scale = own[0]
        weight = (model().get_submodule(layer).weight.detach() / scale).clamp(-6, 6)
        position = torch.searchsorted(grid, weight.contiguous()).clamp(1, 14)
        low, high = grid[position - 1], grid[position]
        ours = value / scale
        near = torch.minimum((ours - low).abs(), (ours - high).abs())
        assert float(near.max()) < 1e-5


class Flat(nn.Module):
    """Layers that no block is around, one of them with weights that are numbers of the format."""

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.other = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.exact.weight.data = torch.eye(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.exact(x)))


def test_what_does_not_gain_is_rounded_to_nearest_and_says_so() -> None:
    program = quantized(Flat(), BATCHES[0][0], scheme=SCHEMES["weights alone"])
    result, *_ = calibrated(program, f"{LEARN},quantize-weights")
    assert notes(program)["exact"].startswith("rounded to nearest: learning does not help exact")
    assert result.statistics["rounded to nearest, since learning does not help: blocks"] >= 1
    assert torch.equal(stored(program)["exact"], torch.eye(WIDTH))


class Shared(nn.Module):
    """Blocks that share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks[1].down = self.blocks[0].down

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_weights_that_blocks_share_are_left_to_the_next_pass() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = quantized(Shared().eval(), BATCHES[0][0], scheme=SCHEMES["weights alone"])
    result, *_ = calibrated(program, f"{LEARN},quantize-weights")
    assert result.statistics["weights left, since blocks share them"] == 1
    assert len(stored(program)) == 8
    assert len([note for note in notes(program).values() if "learned" in note]) == 6


def test_with_a_folder_it_goes_on_and_leaves_results_alone(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        program = small(SCHEMES["row"])
        calibrated(program, LEARN, folder=tmp_path)
        weights.append(codes_of(program))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"results"}
    assert len(files) == 3


def test_options_change_what_is_learned() -> None:
    found = {}
    for text in ("", " inputs=float", " parametrization=scale-aware", " iterations=3"):
        options = f"iterations=20{text}" if "iterations" not in text else text.strip()
        program = small(SCHEMES["row"])
        calibrated(program, f"round-weights{{{options}}}")
        found[text] = torch.cat([v.flatten() for v in codes_of(program).values()])
    values = list(found.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[i + 1 :])


def test_a_budget_shortens_the_work_and_says_so() -> None:
    program = small(SCHEMES["weights alone"])
    (result,) = calibrated(program, "round-weights{iterations=100000 budget=0.4s}")
    assert result.statistics["fewer iterations, for the time given: blocks"] >= 1
    assert 2 <= result.statistics["iterations"] < 20000


def test_the_options_are_text() -> None:
    (item,) = parse_pipeline('round-weights{iterations=7 budget="5min" inputs=float}')
    assert item.seconds() == 300  # type: ignore[attr-defined]
    (again,) = parse_pipeline(pass_text(item))
    assert again == item
    kind = PASSES["round-weights"]
    assert kind().seconds() is None  # type: ignore[attr-defined]
    for text, seconds in (("90", 90), ("1.5 h", 5400), (".5m", 30), ("10SEC", 10)):
        assert kind(budget=text).seconds() == seconds  # type: ignore[attr-defined, call-arg]


WRONG = {
    "budget=soon": "'soon' is no length of time; write for instance 90s, 5min or 1h",
    "budget=0s": "'0s' is no length of time",
    "budget=5days": "'5days' is no length of time",
    "inputs=none": "inputs",
    "parametrization=linear": "parametrization",
    "iterations=-1": "iterations",
}


@pytest.mark.parametrize(("options", "message"), WRONG.items())
def test_options_that_mean_nothing_are_refused(options: str, message: str) -> None:
    with pytest.raises(PassError, match=f"round-weights: {re.escape(message)}"):
        parse_pipeline(f"round-weights{{{options}}}")


def test_data_is_needed_and_more_than_one_batch() -> None:
    program = small(SCHEMES["row"])
    with pytest.raises(PassError, match="round-weights needs calibration data"):
        run_pipeline(program, parse_pipeline(LEARN))
    with pytest.raises(PassError, match="round-weights needs at least two batches"):
        calibrated(program, LEARN, BATCHES[:1])


def test_a_compiled_model_says_what_was_learned_and_a_dump_runs_again(tmp_path: Path) -> None:
    files = []
    for number, (batch,) in enumerate(BATCHES):
        files.append(str(tmp_path / f"batch{number}.safetensors"))
        save_file({"0": batch}, files[-1])
    compiled = fpcompiler.compile(
        model(), calibration=[batch[0] for batch in BATCHES],
        pipeline=f"cse,normalize,fold-constants,insert-quantize{{scheme=w4a6}},cse,{LEARN},"
        "quantize-weights,lower-gemm",
        dump_dir=tmp_path / "dumps", dump_weights=True,
    )  # fmt: skip
    rows = {row.name: str(row) for row in compiled.plan().rows}
    assert "rounding learned: output error of blocks.0" in rows["blocks.0.qkv"]
    assert "rounding learned" not in rows["lm_head"]  # which is kept
    assert compiled.verify().ok
    (after,) = (tmp_path / "dumps").glob("*-round-weights.mlir")
    header, _, wanted = after.read_text().partition("\n")
    before, text = header.removeprefix("// fpcompiler opt ").split(" -p ")
    arguments = ["opt", str(tmp_path / "dumps" / before), "-p", text.strip("'")]
    assert main([*arguments, "-o", str(tmp_path / "x"), "--calibration", *files]) == 0
    assert (tmp_path / "x").read_text() == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_as_well() -> None:
    errors = []
    for device in ("cpu", "cuda"):
        program = small(SCHEMES["row"])
        calibration = Calibration(BATCHES, device=torch.device(device))
        items = parse_pipeline(f"{LEARN},quantize-weights")
        before = torch.cuda.memory_allocated()
        run_pipeline(program, items, calibration=calibration)
        assert torch.cuda.memory_allocated() - before < 1 << 20
        assert all(value.device == CPU for value in program.weights.values())
        errors.append(error(program))
    # Sums in another order, and bfloat16 in learning, lead to other roundings, about as good.
    assert errors[1] == pytest.approx(errors[0], rel=0.25)


def test_models_in_half_precision() -> None:
    half = model().to(torch.bfloat16)
    batches = [(batch.bfloat16(),) for (batch,) in BATCHES]
    program = quantized(half, batches[0][0], scheme=SCHEMES["row"])
    result, *_ = calibrated(program, f"{LEARN},quantize-weights", batches)
    assert result.statistics["roundings learned: blocks"] == 3
    (output,) = evaluate(program, FRESH.bfloat16())
    assert output.dtype == torch.bfloat16


def test_batches_may_differ_in_size() -> None:
    batches = [(tokens(10 * seed, 1 + seed),) for seed in range(4)]
    program = quantized(model(), batches[3][0], scheme=SCHEMES["row"], dynamic="auto")
    result, *_ = calibrated(program, f"{LEARN},quantize-weights", batches)
    assert result.statistics["roundings learned: blocks"] == 3
    assert evaluate(program, normal(3, 5, WIDTH))[0].shape == (3, 5, 8)
