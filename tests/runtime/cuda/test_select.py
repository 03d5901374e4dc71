"""Which kernels a GPU gets, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpcompiler.artifact import Artifact, save
from fpcompiler.artifact.kernels import KernelIndex, TargetKernels
from fpcompiler.errors import TargetError
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.kernels import load_kernels
from fpcompiler.runtime.cuda.select import select
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.strict import require_kernels
from fpcompiler.runtime.trust import Gatekeeper
from tests.kernel_files import kernel_files, kernel_index
from tests.plans import mlp_artifact


def index_of(**targets: tuple[str, ...]) -> KernelIndex:
    return KernelIndex({
        name: TargetKernels(name, capabilities, {}, {}, {})
        for name, capabilities in targets.items()
    })  # fmt: skip


ALL = index_of(sm_100a=("10.0",), sm_100f=("10.0", "10.3"), sm_90a=("9.0",), sm_120f=("12.0",))


@pytest.mark.parametrize(
    ("capability", "target"),
    [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_100f"), ((12, 0), "sm_120f")],
)
def test_the_kernels_for_the_fewest_gpus_are_taken(
    capability: tuple[int, int], target: str
) -> None:
    assert select(ALL, capability).target == target


@pytest.mark.parametrize("capability", [(8, 9), (9, 1), (12, 1), (1, 0), (100, 0)])
def test_other_gpus_are_refused_with_the_list_of_what_there_is(
    capability: tuple[int, int],
) -> None:
    with pytest.raises(TargetError) as caught:
        select(ALL, capability)
    assert str(caught.value) == (
        "the artifact has no kernels for this GPU, which has compute capability "
        f"{capability[0]}.{capability[1]}. It has kernels for sm_100a (compute capability 10.0); "
        "sm_100f (compute capability 10.0, 10.3); sm_90a (compute capability 9.0); sm_120f "
        "(compute capability 12.0). Compile the model for this GPU too, or load it with "
        "kernels=False to run it as the reference does."
    )


def test_the_gpu_of_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gatekeeper = Gatekeeper(Options(cache=tmp_path))
    with pytest.raises(TargetError, match=r"has compute capability 9.0. It has kernels for sm_100"):
        load_kernels(kernel_files(b"library"), torch.device("cuda"), gatekeeper)
    assert load_kernels({}, torch.device("cuda"), gatekeeper) is None


def test_the_cpu_loads_no_kernels(tmp_path: Path) -> None:
    artifact: Artifact = mlp_artifact()
    object.__setattr__(artifact, "kernels", kernel_files(b"no library at all"))
    save(tmp_path / "model.fpc", artifact)
    x = torch.randn(2, 64)
    found = load(tmp_path / "model.fpc", trust=True)(x)["logits"]
    assert torch.equal(found, load(tmp_path / "model.fpc", kernels=False)(x)["logits"])


def test_strict_wants_a_kernel_for_every_layer() -> None:
    artifact, target = mlp_artifact(), kernel_index(b"").targets["sm_100a"]
    arguments = artifact.plan, artifact.tensors, torch.device("cpu")
    require_kernels(*arguments)
    with pytest.raises(TargetError, match="sm_100a: down: no instruction takes its formats"):
        require_kernels(*arguments, target)
    both = dict.fromkeys(("up", "down"), target.layers["up"])
    whole = TargetKernels("sm_100a", ("10.0",), {}, target.instances, both)
    require_kernels(*arguments, whole)
