"""Sources of GEMMs: golden files, and what holds for all of them."""

import importlib.util
import itertools
import json
import re

import pytest

from fpcompiler.codegen.cutlass import package
from fpcompiler.codegen.cutlass.emit import emit
from fpcompiler.codegen.cutlass.epilogue import epilogue_steps
from fpcompiler.codegen.cutlass.instance import Instance, instances
from fpcompiler.codegen.problem import Activation, Epilogue, OutputType, Rows
from fpcompiler.errors import DependencyError
from tests.codegen.problems import E3M0, MXFP4, NVFP4, W4A6, W4A6_ROW, W4A8, instance_of, problem

needs_cutlass = pytest.mark.skipif(
    importlib.util.find_spec("cutlass_library") is None, reason="nvidia-cutlass is not installed"
)

GELU_RESIDUAL = Epilogue(bias=True, activation=Activation.GELU, residual=True)
GOLDEN = [
    problem(NVFP4, "sm_100a"),
    problem(W4A6, "sm_100f", Rows.DECODE),
    problem(W4A6_ROW, "sm_100a", epilogue=GELU_RESIDUAL, output=OutputType.F16),
    problem(MXFP4, "sm_120a"),
    problem(E3M0, "sm_121a", epilogue=Epilogue(activation=Activation.SILU)),
    problem(W4A6_ROW, "sm_90a", Rows.DECODE, output=OutputType.F32),
]


@needs_cutlass
@pytest.mark.parametrize("layer", GOLDEN, ids=lambda layer: instance_of(layer).name)
def test_the_source(layer, golden) -> None:
    instance = instance_of(layer)
    golden(f"{instance.name}.cu", emit(instance).text)


def all_instances() -> list[Instance]:
    pairs = [NVFP4, MXFP4, W4A6, W4A8, W4A6_ROW, E3M0]
    cases = [(pair, arch) for pair in pairs for arch in ("sm_100a", "sm_120a")]
    found = []
    for (pair, arch), rows, function in itertools.product(
        [*cases, (W4A6_ROW, "sm_90a")], Rows, Activation
    ):
        epilogue = Epilogue(activation=function, residual=function is not Activation.NONE)
        layer = problem(pair, arch, rows, epilogue)
        found += instances(layer)
    return list(dict.fromkeys(found))


@needs_cutlass
def test_every_instance_has_a_source_of_its_own() -> None:
    instances = all_instances()
    texts = [emit(instance).text for instance in instances]
    assert len(set(texts)) == len(instances) > 80
    for instance, text in zip(instances, texts, strict=True):
        assert "$" not in text  # a placeholder that was left
        assert f"struct {instance.name} :" in text
        assert f"Shape<{', '.join(f'_{size}' for size in instance.tile.of_one_sm)}>" in text


@needs_cutlass
def test_hopper_sums_without_the_fast_mode() -> None:
    for rows in Rows:
        text = emit(instance_of(problem(W4A6_ROW, "sm_90a", rows))).text
        assert "KernelTmaWarpSpecialized" in text
        assert "FastAccum" not in text


@needs_cutlass
def test_the_description_stands_in_the_source() -> None:
    source = emit(instance_of(problem(W4A6, "sm_100a")))
    text = re.search(r'R"json\((.*)\)json"', source.text)
    assert text is not None
    assert json.loads(text[1]) == source.description
    assert source.description["tile"]["cluster"] == [2, 1]
    assert source.headers == "nvidia-cutlass 4.2.0.0"


def test_only_the_last_step_rounds() -> None:
    steps = epilogue_steps(instance_of(GOLDEN[2]))
    assert [step.output for step in steps] == ["float", "float", "cutlass::half_t"]
    assert [step.alias for step in steps] == ["Biased", "Activated", "Added"]


def test_without_cutlass_the_error_says_what_to_install(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(package.importlib.metadata, "version", missing)
    with pytest.raises(DependencyError, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0"):
        package.find_cutlass()


@needs_cutlass
def test_another_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(package.importlib.metadata, "version", lambda _: "3.8.0.0")
    with pytest.raises(DependencyError, match=r"nvidia-cutlass 3\.8\.0\.0 is installed"):
        package.find_cutlass()


@needs_cutlass
def test_wide_tiles_finish_32_columns_at_a_time() -> None:
    normal, wide = (emit(each).text for each in instances(problem(NVFP4, "sm_100a")))
    assert "cute::Shape<cute::_128, cute::_32>" in wide
    assert "EpilogueTileAuto" not in wide
    assert "EpilogueTileAuto" in normal
