"""Which kernels a compiled model gets, and the files that it carries them in."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fpcompiler
from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.kernels import INDEX, KernelIndex
from fpcompiler.cli.main import main
from fpcompiler.codegen import build
from fpcompiler.codegen import package as packaging
from fpcompiler.codegen.gemms import gemms_of
from fpcompiler.codegen.kernel import BuiltKernel, KernelSource
from fpcompiler.codegen.kernel_plan import plan_kernels
from fpcompiler.codegen.package import package
from fpcompiler.codegen.problem import Activation, OutputType
from fpcompiler.errors import DependencyError, OptionError, TargetError
from fpcompiler.options import Options
from fpcompiler.scheme import Scheme


class Mixed(nn.Module):
    """Norm and activation in front of quantizers, an activation behind a layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 160), nn.Linear(160, 64)
        self.gate, self.lm_head = nn.Linear(64, 40, bias=False), nn.Linear(40, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        result: torch.Tensor = self.lm_head(nn.functional.silu(self.gate(x)))
        return result


def compiled(scheme: str, dtype: torch.dtype = torch.float32, **options: Any):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return fpcompiler.compile(Mixed().eval().to(dtype), scheme, example_inputs=(x,), **options)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Take the place of the compiler and of the proof; return what was compiled."""
    compiled_names: list[str] = []

    class Cache:
        @classmethod
        def from_options(cls, options: Options) -> Cache:
            return cls()

        def require_folder(self) -> None:
            pass

        def stream(
            self, sources: Sequence[KernelSource]
        ) -> Iterator[tuple[KernelSource, BuiltKernel]]:
            for source in sources:
                compiled_names.append(source.name)
                yield source, _built(source, tmp_path / source.name)

    def proof(kernel: BuiltKernel, options: Options) -> dict[str, Any]:
        check = {"level": "L2", "name": "launch", "outcome": outcome[0], "findings": ["too wide"]}
        name = kernel.metadata["name"]
        return {
            "kernel": name, "toolchain": "nvcc", "checks": [check], "machine_code": {"name": name}
        }  # fmt: skip

    outcome = ["passed"]
    operators = tmp_path / "operators.so"
    operators.write_bytes(b"operators")
    monkeypatch.setattr(packaging, "KernelCache", Cache)
    monkeypatch.setattr(packaging, "recorded_proof", proof)
    monkeypatch.setattr(packaging, "build_operators", lambda options: operators)
    return compiled_names, outcome


def _built(source: KernelSource, folder: Path) -> BuiltKernel:
    folder.mkdir(exist_ok=True)
    library = source.name.encode()
    for name, data in (("kernel.so", library), ("kernel.cu", b"cu"), ("build.log", b"log")):
        (folder / name).write_bytes(data)
    digest = hashlib.sha256(library).hexdigest()
    metadata = {"name": source.name, "sha256": digest, "toolchain": "nvcc", "headers": "cutlass"}
    return BuiltKernel(folder / "kernel.so", metadata, cached=False)


def test_gemms_are_read_from_the_plan() -> None:
    artifact = compiled("nvfp4", torch.bfloat16).artifact
    found = {gemm.layer: gemm for gemm in gemms_of(artifact.plan, artifact.tensors)}
    assert {name: (g.n, g.k, g.bias) for name, g in found.items()} == {
        "up": (160, 64, True), "down": (64, 160, True), "gate": (40, 64, False),
    }  # fmt: skip
    assert found["gate"].function is Activation.SILU
    assert found["up"].function is Activation.NONE  # its GELU is fused with the next quantizer
    assert {gemm.output for gemm in found.values()} == {OutputType.BF16}
    assert [name for name, gemm in found.items() if gemm.residual] == ["down"]


def test_layers_share_kernels_and_a_reason_is_kept() -> None:
    artifact = compiled("nvfp4; gate: w4a16").artifact
    plan = plan_kernels(gemms_of(artifact.plan, artifact.tensors), "sm_100a")
    # For few rows and for many, and such that add a residual.
    assert len(plan.instances) == 4
    assert plan.layers["up"] != plan.layers["down"]
    assert "there is no FP4 kernel" in str(plan.layers["gate"])
    assert "16 bits" in str(plan.layers["gate"])


def test_rows_longer_than_packed_kernels_take_have_a_reason() -> None:
    artifact = compiled("nvfp4", torch.bfloat16).artifact
    up = gemms_of(artifact.plan, artifact.tensors)[0]
    fits, longer = (replace(up, layer=str(k), k=k) for k in (1 << 16, (1 << 16) + 16))
    plan = plan_kernels((fits, longer), "sm_90a")
    assert not isinstance(plan.layers["65536"], str)
    assert "65552 numbers, and kernels of packed weights take up to 65536" in str(
        plan.layers["65552"]
    )
    assert not isinstance(plan_kernels((longer,), "sm_100a").layers["65552"], str)


def test_an_artifact_carries_kernels_for_several_targets(fake, tmp_path, capsys) -> None:
    names, _ = fake
    model = compiled("nvfp4", target=["cpu", "sm_100a", "sm_120a"])
    assert model.artifact.targets == ("cpu", "sm_100a", "sm_120a")
    model.save(tmp_path / "model.fpc")
    read = fpcompiler.artifact.read(tmp_path / "model.fpc")
    index = KernelIndex.of(read.kernels)
    assert [*index.targets] == ["sm_100a", "sm_120a"]
    assert sorted(names) == sorted(
        instance.name for _, instance in index.all_instances() if instance.role != "operators"
    )
    for target in index.targets.values():
        assert {i.role for i in target.instances.values()} == {"gemm", "quantize", "operators"}
        uses = target.layers["up"].kernels
        assert {*uses} == {"decode", "prefill", "quantize"}
        assert target.instances[uses["decode"]].files["proof"].endswith(".proof.json")
        assert uses["prefill"] != target.layers["gate"].kernels["prefill"]  # SiLU behind it
    described = index.targets["sm_100a"].instances["quantize_sm_100a"].problem
    producers = {row["producer"] for row in described["problems"]}
    assert producers == {"layer_norm", "gelu", ""}
    x = torch.randn(3, 64)
    assert torch.equal(fpcompiler.load(tmp_path / "model.fpc")(x), model(x))
    assert main(["inspect", str(tmp_path / "model.fpc")]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert main(["inspect", "--json", str(tmp_path / "model.fpc")]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [row["GPU"] for row in kernels] == ["sm_100a", "sm_120a"]


def test_a_kernel_that_is_not_proved_is_not_given_to_anyone(fake) -> None:
    fake[1][0] = "failed"
    with pytest.raises(TargetError, match="does not pass L2, launch: too wide"):
        compiled("nvfp4", target="sm_100a")


def test_no_kernel_for_any_layer_is_an_error(fake) -> None:
    with pytest.raises(TargetError, match=r"No layer has a kernel on sm_100a.*16 bits"):
        compiled("w4a16", target="sm_100a")


def test_plain_activations_are_multiplied_in_bf16_on_hopper(fake) -> None:
    with pytest.raises(TargetError, match=r"this model has f32\. Convert it to bfloat16"):
        compiled("w4a16", target="sm_90a")
    bf16 = compiled("w4a16", torch.bfloat16, target="sm_90a", keep_if_slower=False)
    kernels = bf16.artifact.kernels
    assert all(row.kernels for row in KernelIndex.of(kernels).targets["sm_90a"].layers.values())


def test_a_model_without_quantized_layers_gets_no_kernels(fake) -> None:
    with pytest.raises(TargetError, match="no quantized linear layers"):
        compiled("nvfp4; *: skip", target="sm_100a")


def test_missing_tools_are_said_before_the_model_is_captured(monkeypatch) -> None:
    def missing(options: Options, scheme: Scheme, archs: Sequence[str]) -> None:
        raise DependencyError("There is no nvcc.")

    monkeypatch.setattr(packaging, "require_tools", missing)
    with pytest.raises(DependencyError, match="no nvcc"):
        fpcompiler.compile(nn.Linear(4, 4), "nvfp4", target="sm_100a")


def test_a_cache_that_cannot_be_written_is_said_before_data_are_looked_at(
    monkeypatch, tmp_path
) -> None:
    def batches() -> Iterator[torch.Tensor]:
        raise AssertionError("data are read")
        yield

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FPC_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build, "find_nvcc", lambda options: None)
    options = {"method": "gptq", "calibration": batches(), "target": "sm_100a"}
    with pytest.raises(OptionError, match=r"compiled kernels cannot be kept in .*Point FPC_CACHE"):
        fpcompiler.compile(nn.Linear(64, 64), "w4a16", **options)


@pytest.mark.parametrize(
    ("scheme", "archs", "needed"),
    [
        ("w4a6-row", ["sm_90a"], False),
        ("nvfp4; gate: skip; up: w4a16", ["sm_90a"], False),
        ("nvfp4; gate: w=f6E2M3FN@row:f32,a=f6E2M3FN@token:f32", ["sm_90a"], True),
        ("w4a6-row", ["sm_90a", "sm_100a"], True),
    ],
)
def test_cutlass_is_asked_for_where_it_writes_kernels(
    scheme: str, archs: list[str], needed: bool, fake, monkeypatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(packaging.cutlass, "find_cutlass", lambda: asked.append(True))
    packaging.require_tools(Options(), Scheme.of(scheme), archs)
    assert bool(asked) == needed


def test_packed_kernels_need_no_cutlass_and_have_no_proof(
    fake, monkeypatch, tmp_path, capsys
) -> None:
    def missing() -> None:
        raise DependencyError("nvidia-cutlass is not installed.")

    emitting = importlib.import_module("fpcompiler.codegen.cutlass.emit")
    for module in (packaging.cutlass, emitting):
        monkeypatch.setattr(module, "find_cutlass", missing)
    artifact = compiled("nvfp4", torch.bfloat16, target="cpu,sm_90a").artifact
    path = str(_saved(artifact, tmp_path))
    assert main(["inspect", path]) == 0
    assert "2 by selftest only" in capsys.readouterr().out
    for more in ([], ["--recorded"]):
        assert main(["prove", path, *more]) == 1
        error = capsys.readouterr().err
        assert "fpcompiler's own" in error
        assert f"`fpcompiler selftest {path}`" in error


def test_layers_that_would_be_slower_on_the_only_target_are_kept(fake, tmp_path) -> None:
    with pytest.warns(UserWarning, match="keep_if_slower: no layer was quantized. 3 that the"):
        model = compiled("nvfp4", torch.bfloat16, target="sm_90a")
    assert not any(row.quantized for row in model.plan().rows)
    assert "slower than bf16 if quantized: 0." in model.plan().rows[0].reason
    assert fake[0] == []
    again = fpcompiler.load(_saved(model.artifact, tmp_path))
    assert again.artifact.kernels == {}
    assert again.artifact.targets == ("cpu", "sm_90a")
    assert again.verify().ok
    assert "3 layers stay in 16 bits" in again.reports["keep-if-slower"]


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"target": "cpu,sm_90a"}, 3),
        ({"target": "sm_90a", "keep_if_slower": False}, 3),
        ({"target": "sm_90a", "dtype": torch.float32}, 3),
        ({"target": ["sm_90a", "sm_100a"]}, 3),
        ({"target": ["sm_90a", "sm_100a"], "keep_if_slower": True}, 3),  # the estimate gains
    ],
)
def test_they_are_quantized_where_they_may_gain_elsewhere(options, quantized, fake) -> None:
    model = compiled("nvfp4", **{"dtype": torch.bfloat16, **options})
    assert sum(row.quantized for row in model.plan().rows) == quantized


@pytest.mark.filterwarnings("default:keep_if_slower")
def test_the_command_line_says_what_is_predicted_and_kept(fake, monkeypatch, tmp_path, capsys):
    (tmp_path / "kept_models.py").write_text(
        "import torch\nfrom tests.codegen.test_package import Mixed\n"
        "def mixed():\n    return Mixed().bfloat16(), {'x': torch.randn(3, 64).bfloat16()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["compile", "kept_models:mixed", "--scheme", "nvfp4", "--target", "sm_90a", "-o"]
    assert main([*words, str(tmp_path / "kept.fpc")]) == 0
    shown = capsys.readouterr()
    assert "warning: keep_if_slower: no layer was quantized. 3 that" in shown.err
    assert "layers: 0 of 4 quantized" in shown.out
    assert "3 layers stay in 16 bits, because they would be slower quantized" in shown.out
    assert "layers on sm_90a, against bf16 (predicted): M = 1: " in shown.out
    assert main([*words, str(tmp_path / "all.fpc"), "--no-keep-if-slower"]) == 0
    shown = capsys.readouterr()
    assert "layers: 3 of 4 quantized" in shown.out
    assert "keep_if_slower" not in shown.err
    assert main(["inspect", str(tmp_path / "all.fpc")]) == 0
    assert "slower than bf16 with M = 1, 16" in " ".join(capsys.readouterr().out.split())
    assert main([*words, str(tmp_path / "no.fpc"), "--target", "cpu", "--keep-if-slower"]) == 1
    assert "target='cpu' names none" in capsys.readouterr().err


def test_keeping_can_be_asked_for_beside_a_cpu(fake) -> None:
    with pytest.warns(UserWarning, match="no layer was quantized"):
        compiled("nvfp4", torch.bfloat16, target="cpu,sm_90a", keep_if_slower=True)
    with pytest.raises(OptionError, match="names none"):
        compiled("nvfp4", keep_if_slower=True)
    with pytest.raises(OptionError, match="keep_if_slower must be True, False or None"):
        compiled("nvfp4", keep_if_slower="yes")
    with pytest.raises(OptionError, match="static_inputs= and keep_if_slower="):
        compiled("nvfp4", target="sm_90a", keep_if_slower=True, pipeline="cse")


@pytest.mark.nvcc
@pytest.mark.slow
def test_a_real_model_for_a_real_target(tmp_path) -> None:
    artifact = compiled("nvfp4; gate: w4a16", torch.bfloat16, target="cpu,sm_120a").artifact
    call = artifact.golden[0].inputs
    files = package(artifact.plan, artifact.tensors, call, ["sm_120a"], Options.from_env())
    index = KernelIndex.of(files)
    gemms = {i.name: i for _, i in index.all_instances() if i.role == "gemm"}
    assert sorted(gemms) == [
        "gemm_sm_120a_nvf4_e2m1_e2m1_bf16_128x128x128",
        "gemm_sm_120a_nvf4_e2m1_e2m1_bf16_residual_128x128x128",
    ]
    for gemm in gemms.values():
        record = jsonfile.parse(files[gemm.files["proof"]], "proof", 1 << 26)
        assert record["passed"] is True
        assert record["sha256"] == gemm.sha256
    assert json.loads(bytes(files[INDEX]))["targets"]["sm_120a"]["capabilities"] == ["12.0"]
    assert main(["prove", str(_saved(artifact, tmp_path)), "--recorded"]) == 0


def _saved(artifact: Any, folder: Path) -> Path:
    path = folder / "model.fpc"
    fpcompiler.artifact.save(path, artifact)
    return path
