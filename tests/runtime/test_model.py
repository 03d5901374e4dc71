import copy
import io
import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fpcompiler.artifact import Golden
from fpcompiler.errors import ArtifactError, OptionError, RunError
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.verify import _noise, judge
from tests.plans import Mlp, PackedLinear, expanded, mlp_artifact, with_golden

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def eager() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def compiled(eager) -> CompiledModel:
    torch.manual_seed(1)
    artifact = with_golden(mlp_artifact(eager), torch.randn(2, 64), torch.randn(1, 64))
    return CompiledModel(artifact)


@pytest.fixture
def path(compiled, tmp_path) -> Path:
    compiled.save(tmp_path / "model.fpc")
    return tmp_path / "model.fpc"


X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)


def test_it_computes_what_the_quantized_weights_say(eager):
    quantized = Mlp()
    quantized.load_state_dict(eager.state_dict())
    for name in ("up", "down"):
        packed = PackedLinear.of(name, getattr(eager, name))
        getattr(quantized, name).weight.data = expanded(packed)
    result = CompiledModel(mlp_artifact(eager, activation=""))(X)
    expected = quantized(X)
    assert torch.allclose(result["logits"], expected["logits"], atol=1e-5)
    assert torch.allclose(result["hidden"][0], expected["hidden"][0], atol=1e-5)


def test_a_loaded_model_gives_the_same_bits(compiled, path):
    loaded = load(path)
    for rows in (1, 2, 3):
        x = torch.randn(rows, 64)
        assert torch.equal(loaded(x)["logits"], compiled(x)["logits"])
    assert loaded.scheme == compiled.scheme
    assert repr(loaded) == f"CompiledModel({compiled.scheme!r}, 3 layers)"
    loaded.save(path)  # Over the file that it is mapped from.
    assert torch.equal(load(path)(X)["logits"], loaded(X)["logits"])


def test_a_file_that_is_no_artifact_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match="looks like a GGUF model"):
        load(tmp_path / "x")


def test_a_deferred_model_is_built_by_its_first_call(eager):
    calls = []

    def build(args, kwargs):
        calls.append((args, kwargs))
        return mlp_artifact(eager)

    deferred = CompiledModel.deferred(build, scheme="w4a6", dumps=Path("dumps"))
    assert repr(deferred) == "CompiledModel('w4a6', captured by the first call)"
    for use in (deferred.plan, deferred.verify, lambda: deferred.save("x")):
        with pytest.raises(RunError, match=r"which has not happened yet. Call it once, or pass"):
            use()
    deferred.reset()
    first = deferred(X, use_cache=False)["logits"]
    assert torch.equal(deferred(X)["logits"], first)
    assert calls == [((X,), {"use_cache": False})]
    assert deferred.scheme == mlp_artifact(eager).scheme
    assert len(deferred.plan().rows) == 3
    assert deferred.dumps == Path("dumps")


def test_comparing_a_deferred_model_builds_it(eager):
    deferred = CompiledModel.deferred(lambda args, kwargs: mlp_artifact(eager))
    assert deferred.compare(eager, [X]).rows[0].calls == 2


def test_a_compiled_model_can_be_compiled_by_torch(compiled):
    function = torch.compile(compiled, backend="eager", fullgraph=True)
    assert torch.equal(function(X)["logits"], compiled(X)["logits"])


def test_threads_that_call_a_deferred_model_build_it_once(eager):
    built = []

    def build(args, kwargs):
        built.append(args)
        time.sleep(0.05)
        return mlp_artifact(eager)

    deferred = CompiledModel.deferred(build)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: deferred(X)["logits"], range(4)))
    assert len(built) == 1
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_the_same_bits(compiled, path, copied):
    expected = compiled(X)["logits"]
    for model in (compiled, load(path)):
        assert torch.equal(copied(model)(X)["logits"], expected)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "'gpu' is no device"), ("cuda:99", "'cuda:99' cannot be used")],
)
def test_a_device_that_is_not_there_is_refused(path, device, message):
    with pytest.raises(OptionError, match=message):
        load(path, device)
    with pytest.raises(OptionError, match=message):
        CompiledModel.deferred(lambda args, kwargs: mlp_artifact(None), device=device)


def test_a_failed_build_leaves_the_model_as_it_was(eager):
    errors = [RunError("no")]

    def build(args, kwargs):
        if errors:
            raise errors.pop()
        return mlp_artifact(eager)

    deferred = CompiledModel.deferred(build)
    with pytest.raises(RunError, match="no"):
        deferred(X)
    assert deferred(X)["logits"].shape == (3, 8)


# The plan


def test_the_plan_shows_every_layer_and_the_total(compiled):
    table = compiled.plan()
    assert [row.name for row in table.rows] == ["up", "down", "head"]
    text = str(table)
    for part in ("96x64", "f4E2M1FN@row:f32/block32:f8E8M0FNU", "reference", "skip"):
        assert part in text
    total = next(line for line in text.splitlines() if "3 layers" in line)
    assert total.split() == "3 layers, 2 quantized, 0.146x 48.0 KiB 7.0 KiB".split()  # noqa: SIM905
    data = json.loads(json.dumps(table.to_json()))
    assert data["bytes_before"] == sum(row.bytes_before for row in table.rows) == 49153
    assert data["rows"][0]["shape"] == [96, 64]
    assert data["scheme"] == compiled.scheme


def test_the_plan_is_readable_on_a_narrow_terminal(compiled):
    console = Console(width=80, file=io.StringIO())
    console.print(compiled.plan())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("48.0 KiB" in line and "7.0 KiB" in line for line in lines)


def test_texts_with_brackets_are_shown_as_they_are(compiled):
    row = replace(compiled.plan().rows[0], reason="[s0, 64] [bold]no[/bold]")
    assert "[s0, 64] [bold]no[/bold]" in str(replace(compiled.plan(), rows=(row,)))


# Verification


def test_a_good_artifact_is_verified(path):
    report = load(path).verify()
    assert report.ok
    assert [row.check for row in report.rows] == [
        "file",
        "plan, shapes and scales",
        "recorded call 0",
        "recorded call 1",
    ]
    assert "all checksums agree" in report.rows[0].detail
    assert report.rows[2].detail == "SQNR inf dB, bit-equal"
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert "recorded call 1" in str(report)


def test_verification_does_not_touch_the_state(compiled):
    compiled(X)
    compiled.verify()
    compiled.compare(Mlp(), [X])
    assert compiled._executor._state["calls"].item() == 1
    compiled.reset()
    assert compiled._executor._state["calls"].item() == 0


def test_a_file_that_changed_since_is_noticed(path):
    loaded = load(path)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.unlink()
    path.write_bytes(data)
    report = loaded.verify()
    assert not report.ok
    assert report.rows[0].result == "failed"
    assert "was changed" in report.rows[0].detail


def changed(compiled: CompiledModel, change) -> CompiledModel:
    first, second = compiled.artifact.golden
    case = Golden(first.inputs, tuple(change(t) for t in first.outputs))
    return CompiledModel(replace(compiled.artifact, golden=(case, second)))


@pytest.mark.parametrize(
    ("change", "good", "detail"),
    [
        (lambda t: t * (1 + 1e-4), True, "dB, not bit-equal"),
        (lambda t: t * 1.1, False, "SQNR 20.8 dB, not bit-equal"),
        (lambda t: t.double(), False, "other shapes or dtypes"),
        (lambda t: t[:1], False, "other shapes or dtypes"),
        (lambda t: t * torch.nan, False, "SQNR nan dB"),
    ],
)
def test_replayed_outputs_must_be_close(compiled, change, good, detail):
    report = changed(compiled, change).verify()
    assert report.ok is good
    assert detail in report.rows[1].detail


@pytest.mark.parametrize(("sqnr", "good"), [(41.0, True), (22.0, True), (19.0, False)])
def test_what_last_bits_explain_passes(sqnr, good):
    # DINOv2 on another processor: 26.6 dB, where changes of the last bit alone give 24.2 dB.
    row = judge("recorded call 0", [sqnr], 26.0, False)
    assert (row.result == "ok") is good
    assert "last bit alone give 26.0 dB" in row.detail
    assert judge("recorded call 0", [5.0], 7.0, False).result == "failed"


def test_the_noise_of_last_bits_is_measured(compiled):
    artifact = compiled.artifact
    calls = [list(case.outputs) for case in artifact.golden]
    noise = _noise(artifact, Executor(artifact.plan, artifact.tensors), calls)
    assert len(noise) == len(calls)
    assert all(20 < ratio < 160 for ratio in noise)


def test_wrong_scales_and_recorded_inputs_are_noticed(compiled):
    compiled.artifact.tensors["up.w1"].zero_()
    assert "not finite and positive" in compiled.verify().rows[0].detail
    case = Golden((torch.ones(2, 5),), compiled.artifact.golden[0].outputs)
    report = CompiledModel(replace(compiled.artifact, golden=(case,))).verify()
    assert not report.ok
    assert "dimension 1 must be 64" in report.rows[1].detail
    report = CompiledModel(replace(compiled.artifact, golden=())).verify()
    assert report.rows[1].detail == "none were recorded"


# In a new process

SCRIPT = """
import sys
from fpcompiler.runtime.loading import load
import torch
model = load(sys.argv[1])
print(model(torch.linspace(-1, 1, 3 * 64).reshape(3, 64))["logits"].double().sum().item().hex())
model.plan(), model.verify()
parts = ("ir", "passes", "capture", "scheme", "codegen")
loaded = [name for name in sys.modules if name.partition(".")[0] in ("torch_mlir", "transformers")]
loaded += [n for n in sys.modules if n.split(".")[:1] == ["fpcompiler"] and n.split(".")[1:2]
           and n.split(".")[1] in parts]
print(loaded)
"""


def test_loading_in_a_new_process_imports_no_compiler(compiled, path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    total, modules = done.stdout.splitlines()
    assert float.fromhex(total) == compiled(X)["logits"].double().sum().item()
    assert modules == "[]"
