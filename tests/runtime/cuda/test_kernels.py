"""Layers on kernels, end to end, with stand-ins for kernels that compute on the CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.artifact import Artifact, jsonfile, read, save
from fpcompiler.artifact.kernels import DECODE_ROWS, INDEX, KernelIndex, LayerKernels
from fpcompiler.errors import ArtifactError, NumericsError
from fpcompiler.numerics import pack, quantize
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.plan import Symbol
from fpcompiler.runtime.cuda import kernels as module
from fpcompiler.runtime.cuda.form import at_boundary
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.layers import CudaLayer, CudaLinear, Gemm, Machine
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.cuda.quantizers import CudaQuantizer
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.kernels import CUDA, TORCH, kernel_of
from fpcompiler.runtime.trust import Gatekeeper
from tests.plans import Mlp, mlp_artifact
from tests.runtime.cuda.host_kernels import Kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

ROW = "f4E2M1FN@row:f32"
MX = "f4E2M1FN@row:f32/block32:f8E8M0FNU"
NVFP4 = "f4E2M1FN@tensor:f32/block16:f8E4M3FN"
PAIRS = [
    ("sm_90a", ROW, "f6E2M3FN@token:f32"),
    ("sm_90a", ROW, "f8E4M3FN@token:f32"),
    ("sm_90a", "f4E3M0FN@row:f32", "f4E2M1FN@token:f32"),
    ("sm_90a", "f4E2M1FN@tensor:f32", "f6E3M2FN@tensor:f32"),
    ("sm_100a", ROW, "f6E2M3FN@token:f32"),
    ("sm_100a", MX, "f6E2M3FN@block32:f8E8M0FNU"),
    ("sm_120a", MX, "f6E3M2FN@token:f32/block32:f8E8M0FNU"),
    ("sm_100a", "f4E1M2FN@block32:f8E8M0FNU", "f4E1M2FN@block32:f8E8M0FNU"),
    ("sm_100a", NVFP4, NVFP4),
]


def artifact_of(weight: str, activation: str, width: int = 50, hidden: int = 77) -> Artifact:
    torch.manual_seed(1)
    artifact = mlp_artifact(Mlp(width, hidden), weight, activation)
    plan = replace(artifact.plan, symbols={"s0": Symbol(0, 4096)})
    return replace(artifact, plan=plan)


def executors(artifact: Artifact, kernels: CudaKernels) -> tuple[Executor, Executor]:
    plain = Executor(artifact.plan, artifact.tensors)
    return plain, Executor(artifact.plan, artifact.tensors, kernels=kernels)


def input_of(rows: int, width: int = 50) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def assert_near(expected: list[Tensor], found: list[Tensor]) -> None:
    for e, f in zip(expected, found, strict=True):
        assert e.shape == f.shape
        assert e.dtype == f.dtype
        assert f.is_contiguous()
        # The order of sums decides last bits, and those in a few codes of the next layer.
        error = (e.double() - f.double()).norm()
        assert error <= 0.02 * e.double().norm()


@pytest.mark.parametrize(("arch", "weight", "activation"), PAIRS)
def test_a_model_computes_what_the_reference_does(
    arch: str, weight: str, activation: str, tmp_path: Path
) -> None:
    artifact = artifact_of(weight, activation)
    kernels = Kernels(tmp_path, weight, activation, arch)
    plain, fast = executors(artifact, kernels.open("up", "down"))
    for rows in (1, 3, DECODE_ROWS + 2, 0):
        x = input_of(rows)
        assert_near(plain.run_leaves([x]), fast.run_leaves([x]))
    # Each of two layers is called twice.
    assert (kernels.calls("decode"), kernels.calls("prefill")) == (2 * 4, 4)


@pytest.mark.parametrize(("arch", "weight", "activation"), PAIRS)
def test_a_layer_is_the_reference_up_to_the_order_of_sums(
    arch: str, weight: str, activation: str, tmp_path: Path
) -> None:
    artifact = artifact_of(weight, activation)
    plain, fast = executors(artifact, Kernels(tmp_path, weight, activation, arch).open("up"))
    seen: list[list[Tensor]] = [[], []]
    for executor, outputs in zip((plain, fast), seen, strict=True):
        executor.observed(lambda step, y, to=outputs: to.append(y), input_of(5))
    up = [outputs[0] for outputs in seen]
    assert up[0].shape == (5, 77)
    assert torch.allclose(*up, rtol=2e-6, atol=2e-6 * float(up[0].abs().max()))
    assert not torch.equal(up[0], torch.zeros_like(up[0]))


def test_results_in_bfloat16(tmp_path: Path) -> None:
    weight, activation = ROW, "f6E2M3FN@token:f32"
    artifact = artifact_of(weight, activation)
    steps = tuple(
        replace(step, args=(*step.args[:6], {"dtype": "bfloat16"}, step.args[7]))
        if step.op == "fpc.linear" and step.layer == "up" else step
        for step in artifact.plan.steps
    )  # fmt: skip
    artifact = replace(artifact, plan=replace(artifact.plan, steps=steps))
    kernels = Kernels(tmp_path, weight, activation, "sm_90a", "bf16").open("up")
    plain, fast = executors(artifact, kernels)
    assert_near(plain.run_leaves([input_of(4)]), fast.run_leaves([input_of(4)]))
    with pytest.raises(ArtifactError, match=r"'down'.*they give torch.bfloat16, the layer"):
        executors(artifact, replace(kernels, target=Kernels(
            tmp_path, weight, activation, "sm_90a", "bf16").target("down")))  # fmt: skip


QUANTIZED = [
    ("sm_90a", ROW, "f6E2M3FN@token:f32", {"stored": "f8E4M3FN"}),
    ("sm_90a", ROW, "f6E2M3FN@tensor:f32", {"stored": "f8E4M3FN"}),
    ("sm_100a", MX, "f6E2M3FN@block32:f8E8M0FNU", {"swizzled": True}),
    ("sm_100a", NVFP4, NVFP4, {"swizzled": True}),
]

PROBLEMS = [QuantizeProblem(Operand.parse(a), "f32", **form) for _, _, a, form in QUANTIZED]


@pytest.mark.parametrize("sizes", [(112, 96), (64, 328)])  # with padding behind codes and scales
@pytest.mark.parametrize(("arch", "weight", "activation", "form"), QUANTIZED)
def test_kernels_quantize_the_same_codes(
    arch: str,
    weight: str,
    activation: str,
    form: dict[str, bool],
    sizes: tuple[int, int],
    tmp_path: Path,
) -> None:
    artifact = artifact_of(weight, activation, *sizes)
    problem = QuantizeProblem(Operand.parse(activation), "f32", **form)
    assert problem in PROBLEMS
    with_torch = Kernels(tmp_path, weight, activation, arch).open("up", "down")
    kernels = Kernels(tmp_path, weight, activation, arch, quantizers=PROBLEMS)
    with_kernels = kernels.open("up", "down")
    assert [*with_kernels.quantizers.places] == [str(each) for each in PROBLEMS]
    pair = [
        Executor(artifact.plan, artifact.tensors, kernels=each)
        for each in (with_torch, with_kernels)
    ]
    for rows in (130, 1, 0):
        results = [executor.run_leaves([input_of(rows, sizes[0])]) for executor in pair]
        assert all(map(torch.equal, *results))


def test_nan_is_found_by_the_kernels_and_the_layer_is_named(tmp_path: Path) -> None:
    activation = "f6E2M3FN@token:f32"
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a", quantizers=PROBLEMS)
    artifact = artifact_of(ROW, activation)
    executor = Executor(artifact.plan, artifact.tensors, kernels=kernels.open("up", "down"))
    good, bad = input_of(3), input_of(3)
    bad[1, 7] = torch.nan
    expected = executor.run_leaves([good])
    with pytest.raises(NumericsError, match="layer 'up': input holds NaN"):
        executor.run_leaves([bad])
    assert all(map(torch.equal, expected, executor.run_leaves([good])))


def test_quantizers_are_shared_and_constants_stay_off_the_gpu(tmp_path: Path) -> None:
    activation = "f6E2M3FN@token:f32"
    artifact = artifact_of(ROW, activation)
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a").open("up")
    plan = artifact.plan
    assert kernels.own_constants(plan) == {"up.w0", "up.w1", "up.bias"}
    bound = kernels.bind(plan, [abs] * len(plan.steps), artifact.tensors)
    kinds = [type(f).__name__ if f is not abs else step.layer for f, step in
             zip(bound.functions, plan.steps, strict=True)]  # fmt: skip
    assert kinds[:2] == ["CudaQuantizer", "CudaLayer"]
    assert kinds[3:5] == ["down", "down"]
    layers = [f for f in bound.functions if isinstance(f, CudaLayer)]
    assert len(layers) == 2
    assert layers[0].linear is layers[1].linear  # packed once
    quantizers = [f for f in bound.functions if isinstance(f, CudaQuantizer)]
    assert len({f.flags.part(f.place).data_ptr() for f in quantizers}) == 2


def test_reports_call_them_kernels(tmp_path: Path) -> None:
    activation = "f6E2M3FN@token:f32"
    artifact = artifact_of(ROW, activation)
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a").open("up", "down")
    executor = Executor(artifact.plan, artifact.tensors, kernels=kernels)
    assert executor.program([input_of(4)]) is None  # those of the native library know no kernels
    names = [kernel_of(item.step, item.function, (), {}) for item in executor._code]
    layer = [CUDA, CUDA, TORCH]
    assert names == [*layer, *layer, *layer, CUDA, CUDA, TORCH, TORCH]


def test_codes_that_others_read_too_stay_codes(tmp_path: Path) -> None:
    activation = "f6E2M3FN@token:f32"
    artifact = artifact_of(ROW, activation)
    plan = artifact.plan
    shown = replace(plan, outputs=(plan.outputs[0], plan.steps[0].outs[0]))
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a").open("up", "down")
    plain, fast = executors(replace(artifact, plan=shown), kernels)
    assert_near(plain.run_leaves([input_of(4)])[:1], fast.run_leaves([input_of(4)])[:1])
    assert torch.equal(plain.run_leaves([input_of(4)])[1], fast.run_leaves([input_of(4)])[1])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"b": "f6E2M3FN", "a": "f4E2M1FN"}, "f4E2M1FN does not hold f6E2M3FN"),
        ({"scale": "block32:f8E8M0FNU"}, "they read the scales block32:f8E8M0FNU"),
        ({"output": "bf16"}, "they give torch.bfloat16"),
        ({"output": "int8"}, "none that this version runs"),
        ({"residual": 1}, "none that this version runs"),
        ({"a": 7}, "none that this version runs"),
    ],
)
def test_kernels_that_do_not_fit_are_refused_when_the_model_is_loaded(
    change: dict[str, object], cause: str, tmp_path: Path
) -> None:
    activation = "f6E2M3FN@token:f32"
    artifact = artifact_of(ROW, activation)
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a")
    for name in ("decode", "prefill"):
        old = kernels.instances[name]
        kernels.instances[name] = replace(old, problem={**old.problem, **change})
    with pytest.raises(ArtifactError, match=cause):
        Executor(artifact.plan, artifact.tensors, kernels=kernels.open("up"))


def test_packed_weights_in_fp8_take_no_scales_of_blocks() -> None:
    w, x = Operand.parse("e2m1@row:f32"), Operand.parse("e4m3@block32:e8m0")
    codes, scales = quantize(torch.ones(8, 128), w)
    gemm = Gemm(0, "f8E4M3FN", "f4E2M1FN", "none", torch.float32, "none", Mode.E4M3)
    machine = Machine(torch.device("cpu"), 1)
    with pytest.raises(ArtifactError, match="they read the scales none"):
        CudaLinear(
            {"decode": gemm}, machine, [pack(codes, 4), *scales], None, x, w, 128, torch.float32
        )


def test_packed_weights_are_there_before_the_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels read them early, and perhaps on another stream."""
    order: list[str] = []
    gpu = torch.device("cuda", 1)

    def layers(*_: object) -> dict[int, CudaLayer]:
        order.append("packed")
        return {}

    def zeros(*_: object, **__: object) -> Tensor:
        return torch.empty(0, device="meta")

    artifact = artifact_of(ROW, "f6E2M3FN@token:f32")
    kernels = Kernels(tmp_path, ROW, "f6E2M3FN@token:f32", "sm_90a").open("up")
    monkeypatch.setattr(CudaKernels, "_layers", lambda *_: {})
    monkeypatch.setattr(CudaKernels, "_run_layers", layers)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(str(device)))
    for device in (kernels.machine.device, gpu):
        steps = [torch.relu] * len(artifact.plan.steps)
        replace(kernels, machine=Machine(device, 1)).bind(artifact.plan, steps, {})
    assert order == ["packed", "packed", "cuda:1"]


def test_a_layer_needs_a_gemm_and_quantized_inputs(tmp_path: Path) -> None:
    kernels = Kernels(tmp_path, ROW, "f6E2M3FN@token:f32", "sm_90a")
    loaded = kernels.open("up")
    without = replace(loaded.target, layers={"up": LayerKernels({"quantize": "decode"})})
    artifact = artifact_of(ROW, "f6E2M3FN@token:f32")
    with pytest.raises(ArtifactError, match="neither one for few rows nor for many"):
        Executor(artifact.plan, artifact.tensors, kernels=replace(loaded, target=without))
    weight_only = artifact_of(ROW, "")
    with pytest.raises(ArtifactError, match="its activations are not quantized"):
        Executor(weight_only.plan, weight_only.tensors, kernels=loaded)


def test_one_kernel_serves_all_rows(tmp_path: Path) -> None:
    activation = "f6E2M3FN@token:f32"
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a")
    loaded = kernels.open("up")
    only = replace(loaded.target, layers={"up": LayerKernels({"decode": "decode"})})
    plain, fast = executors(artifact_of(ROW, activation), replace(loaded, target=only))
    x = input_of(DECODE_ROWS + 1)
    assert_near(plain.run_leaves([x]), fast.run_leaves([x]))


def test_the_operators_must_be_there(tmp_path: Path) -> None:
    kernels = Kernels(tmp_path, ROW, "f6E2M3FN@token:f32", "sm_90a")
    del kernels.instances["operators"]
    with pytest.raises(ArtifactError, match="without the operators"):
        kernels.open("up")


def test_a_saved_artifact_loads_by_the_capability_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of a file, but for the device, which is a CPU."""
    activation = "f6E2M3FN@token:f32"
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a")
    index = KernelIndex({"sm_90a": kernels.target("up", "down")})
    files = {INDEX: jsonfile.dump(index.to_json()), **kernels.files()}
    artifact = artifact_of(ROW, activation)
    save(tmp_path / "model.fpc", replace(artifact, kernels=files))
    found = read(tmp_path / "model.fpc")
    gatekeeper = Gatekeeper(Options(cache=tmp_path / "cache"), trust=True)
    monkeypatch.setattr(module, "capability_of", lambda device: (0, 0))
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: cls(device, 1)))
    loaded = module.load_kernels(found.kernels, torch.device("cpu"), gatekeeper)
    assert loaded is not None
    plain, fast = executors(found, loaded)
    assert_near(plain.run_leaves([input_of(4)]), fast.run_leaves([input_of(4)]))
    assert len({*(tmp_path / "cache" / "loaded").iterdir()}) == 3  # with the operators


def test_executors_of_one_set_of_kernels_have_weights_of_their_own(tmp_path: Path) -> None:
    activation = "f6E2M3FN@token:f32"
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a").open("up", "down")
    first, other = artifact_of(ROW, activation), artifact_of(ROW, activation)
    swapped = {**other.tensors, "up.w1": 2 * other.tensors["up.w1"]}
    one = Executor(first.plan, first.tensors, kernels=kernels).run_leaves([input_of(2)])
    two = Executor(other.plan, swapped, kernels=kernels).run_leaves([input_of(2)])
    again = Executor(first.plan, first.tensors, kernels=kernels).run_leaves([input_of(2)])
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[0], again[0])


def test_parts_of_tensors_are_read_at_boundaries() -> None:
    whole = torch.arange(64.0)
    assert at_boundary(whole) is whole
    assert at_boundary(whole[8:]).data_ptr() == whole[8:].data_ptr()
    part = at_boundary(whole[3:20])
    assert part.data_ptr() % 32 == 0
    assert torch.equal(part, whole[3:20])
