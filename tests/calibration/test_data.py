"""Calibration data as a user gives it, and the options of compile that go with it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.calibration import calls, parse_bytes
from fpcompiler.errors import CaptureError, OptionError, PassError, RunError
from tests.models import CachedAttention, cases, normal
from tests.passes.tiny import Mlp, tiny


def test_a_batch_is_a_tensor_arguments_or_keywords() -> None:
    x, y = normal(2), normal(3)
    batches = [x, (x, y), [x, y], {"x": x}, UserDict({"y": y})]
    assert [(len(args), sorted(kwargs)) for args, kwargs in calls(batches)] == [
        (1, []), (2, []), (2, []), (0, ["x"]), (0, ["y"]),
    ]  # fmt: skip
    assert calls(batches)[0][0][0] is x
    with pytest.raises(OptionError, match="the calibration data is empty; give at least one batch"):
        calls([])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        (" 512 MiB ", 512 << 20),
        ("1.5kib", 1536),
        (".5 KiB", 512),
        ("7", 7),
        (4096, 4096),
        ("2.TiB", 2 << 40),
        ("12b", 12),
    ],
)
def test_amounts_of_memory(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", ".", "1.2.3", "-4GiB", "0", "0.1b", "4GO", "4 Gi B", "1e9", "nan", "9" * 400],
)
def test_texts_that_are_no_amount(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        fpcompiler.compile(tiny(Mlp), calibration=[normal(2, 32)], max_memory=text)
    assert str(caught.value) == (
        f"{text!r} is no amount of memory; write for instance 4GiB or 512MiB."
    )


def test_a_batch_that_does_not_fit_is_named_by_its_number() -> None:
    batches = [normal(2, 32), (normal(2, 32), normal(2, 32))]
    with pytest.raises(RunError, match="takes 1 positional argument") as caught:
        fpcompiler.compile(tiny(Mlp), calibration=batches, method="gptq")
    assert "in calibration batch 2" in caught.value.__notes__


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (normal(2, 31), r"32"),
        (normal(2, 32).double(), r"float32"),
        (torch.ones(2, 32, dtype=torch.int64), r"float32"),
    ],
    ids=["shape", "float64", "integers"],
)
def test_a_batch_of_another_shape_or_dtype_is_named_by_its_number(batch, message) -> None:
    with pytest.raises(RunError, match=message) as caught:
        fpcompiler.compile(tiny(Mlp), calibration=[normal(2, 32), batch], method="gptq")
    assert "in calibration batch 2" in caught.value.__notes__


@pytest.mark.parametrize("kind", [ValueError, KeyError, StopIteration])
def test_data_that_fails_is_named_by_its_batch(kind: type[Exception]) -> None:
    class Data:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            if index == 1:
                raise kind("no such file")
            return normal(2, 32)

    def drawn() -> Iterator[Tensor]:
        yield from (Data()[index] for index in range(3))

    with pytest.raises(OptionError) as caught:
        calls(drawn())
    failed = RuntimeError if kind is StopIteration else kind  # Python itself turns it into that
    assert str(caught.value).startswith(f"calibration batch 2 cannot be drawn: {failed.__name__}: ")
    assert type(caught.value.__cause__) is failed


def test_an_error_of_ours_in_the_data_stays_what_it_is() -> None:
    def drawn() -> Iterator[Tensor]:
        yield normal(2, 32)
        raise RunError("of the user's own compiled model")

    with pytest.raises(RunError, match="of the user's own compiled model"):
        calls(drawn())


@pytest.mark.parametrize("batch", [normal(2, 31), {"y": normal(2, 32)}], ids=["shape", "name"])
def test_the_first_batch_is_said_to_be_the_example_call(batch) -> None:
    note = "the example inputs are calibration batch 1; example_inputs= gives others"
    data = [batch, normal(2, 32)]
    with pytest.raises(CaptureError) as caught:
        fpcompiler.compile(tiny(Mlp), calibration=data, method="gptq")
    assert note in caught.value.__notes__
    with pytest.raises(CaptureError) as caught:
        fpcompiler.compile(tiny(Mlp), example_inputs=normal(2, 31), calibration=data, method="gptq")
    assert note not in getattr(caught.value, "__notes__", [])


def test_without_data_a_method_says_what_to_pass() -> None:
    with pytest.raises(OptionError, match="the method gptq learns from data: give calibration="):
        fpcompiler.compile(tiny(Mlp), example_inputs=normal(2, 32), method="gptq")
    pipeline = "normalize,insert-quantize,gptq,lower-gemm"
    with pytest.raises(PassError, match=r"^gptq needs calibration data: compile\(\.\.\., calibr"):
        fpcompiler.compile(tiny(Mlp), example_inputs=normal(2, 32), pipeline=pipeline)
    with pytest.raises(OptionError, match="the calibration data is empty"):
        fpcompiler.compile(tiny(Mlp), calibration=[], method="gptq")
    with pytest.raises(PassError, match=r"There is no method 'gtpq'\. Did you mean gptq\?"):
        fpcompiler.compile(tiny(Mlp), example_inputs=normal(2, 32), method="gtpq")


@pytest.mark.parametrize("method", ["gptq", "search-gptq"])
def test_the_memory_does_not_change_the_result(method: str, tmp_path: Path) -> None:
    files = []
    for memory in ("1b", "1GiB"):
        compiled = fpcompiler.compile(
            tiny(Mlp), calibration=[normal(5, 32), normal(1, 32)], method=method, max_memory=memory
        )
        compiled.save(tmp_path / f"{memory}.fpc")
        files.append((tmp_path / f"{memory}.fpc").read_bytes())
    assert files[0] == files[1]


def test_the_seed_reaches_the_sample(tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compiled = fpcompiler.compile(
            tiny(Mlp), "w=f4E2M1FN@row:f32,a=f6E2M3FN@tensor:f32",
            calibration=[normal(4000, 32) ** 3], method="search", seed=seed,
            work_dir=tmp_path / name,
        )  # fmt: skip
        results.append(compiled(normal(4, 32)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    folders = [{f.name for f in (tmp_path / name).iterdir()} for name in "abc"]
    assert folders[0] == folders[1] != folders[2]


def test_a_model_with_state_keeps_it() -> None:
    model, args, _ = cases()["cached"].make()
    batches = [args, *(call[0] for call in cases()["cached"].other_inputs())]
    compiled = fpcompiler.compile(model, "w4a6,skip=none", calibration=batches, method="gptq")
    assert isinstance(model, CachedAttention)
    assert not model.k_cache.any()
    nearest = fpcompiler.compile(model, "w4a6,skip=none", example_inputs=args)
    wanted = [model(*batch).detach() for batch in batches]
    assert wanted[1].shape[1] == 2
    errors = {}
    for name, quantized in (("gptq", compiled), ("rtn", nearest)):
        outputs = [quantized(*batch) for batch in batches]
        errors[name] = sum(float((y - w).norm()) for y, w in zip(outputs, wanted, strict=True))
    # The state starts empty: the outputs of all four calls in a row are near the model's.
    assert errors["gptq"] < 1.1 * errors["rtn"]
    assert errors["gptq"] < 0.3 * sum(float(w.norm()) for w in wanted)


class Half(nn.Module):
    """A model in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gptq", "search", "rotate"])
@pytest.mark.filterwarnings("ignore:The method")
def test_models_in_sixteen_bits(dtype: torch.dtype, method: str) -> None:
    model, x = tiny(Half).to(dtype), normal(6, 64).to(dtype)
    scheme = "w=f4E2M1FN@row:f32,a=f6E2M3FN@tensor:f32,skip=none"
    compiled = fpcompiler.compile(model, scheme, calibration=[x], method=method)
    y, wanted = compiled(x), model(x).detach()
    assert y.dtype == dtype
    assert float((y - wanted).float().norm()) < 0.25 * float(wanted.float().norm())
