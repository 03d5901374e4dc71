"""Recorded launches: how they are read, and what must be noticed in them."""

import dataclasses
import json

import pytest

from fpcompiler.codegen.problem import Activation
from fpcompiler.codegen.proof.contract import check_launch, launch_controls
from fpcompiler.codegen.proof.launch import LaunchRecord, MapType, Swizzle
from fpcompiler.errors import TargetError
from tests.codegen.proof.samples import INSTANCE, SHAPE, launch, sample


def test_what_the_recorder_prints_is_read() -> None:
    record = launch()
    assert [one.tensor for one in record.maps] == ["a", "b", "a_scales", "b_scales", "d"]
    a = record.maps[0]
    assert (a.type, a.swizzle) == (MapType.U6_UNPACKED, Swizzle.B128)
    assert (a.sizes, a.strides, a.box) == ((640, 300, 1), (480, 0), (128, 128, 1))
    assert (record.grid, record.cluster, record.block) == ((3, 9, 1), (1, 1, 1), (256, 1, 1))
    assert dict(record.attributes) == {"max_dynamic_shared_memory": record.shared_memory}
    assert json.loads(json.dumps(record.to_json()))["maps"][2]["type"] == "UINT16"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Segmentation fault",
        '{"event": "launch"}',
        '{"event": "return"}',
        sample("launch").replace('"type": 15', '"type": 99'),
    ],
)
def test_other_texts_are_refused(text) -> None:
    with pytest.raises(TargetError, match="printed something else"):
        LaunchRecord.of_output(SHAPE, text)


def test_two_launches_are_refused() -> None:
    (line,) = [line for line in sample("launch").splitlines() if '"launch"' in line]
    with pytest.raises(TargetError, match="launched 2 kernels"):
        LaunchRecord.of_output(SHAPE, f"{line}\n{sample('launch')}")


def test_the_launch_of_the_instance_passes_and_every_control_is_noticed() -> None:
    record = launch()
    assert check_launch(record, INSTANCE) == ()
    controls = launch_controls(record, INSTANCE)
    assert len(controls) == 7
    for name, (wrong_record, wrong_instance) in controls.items():
        assert check_launch(wrong_record, wrong_instance), name


# What a bug in strides, packing, layouts or tiles would print instead, and who notices.
MISTAKES = {
    "a byte for each code": ('"strides": [480, 0]', '"strides": [640, 0]', "a: "),
    "rows not padded": ("[640, 300, 1]", "[632, 300, 1]", "K in multiples of 128"),
    "FP4 read as FP6": ('"type": 14', '"type": 15', "b: "),
    "FP4 not unpacked": ('"type": 14', '"type": 13', "b: "),
    "scales row by row": ('"strides": [2560, 512, 7680]', '"strides": [20, 4, 6000]', "a_scales: "),
    "an atom too few": ('"sizes": [256, 5, 5, 1]', '"sizes": [256, 4, 5, 1]', "b_scales: "),
    "half of a copy": ('"box": [128, 128, 1]', '"box": [128, 64, 1]', "a: "),
    "no swizzle": ('"swizzle": 3', '"swizzle": 0', "a: "),
    "FP16 results": ('"type": 9', '"type": 6', "d: "),
    "rows of D too long": ('"strides": [1040, 0]', '"strides": [1056, 0]', "d: "),
    "copies that do not fill a tile": ('"box": [32, 128, 1]', '"box": [24, 128, 1]', "d: copies"),
    "a row of tiles too few": ('"grid": [3, 9, 1]', '"grid": [2, 9, 1]', "grid and cluster"),
    "clusters": ('"cluster": [1, 1, 1]', '"cluster": [2, 1, 1]', "grid and cluster"),
    "too much shared memory": ("222208", "242208", "242208 bytes of shared memory"),
    "not asked for": ('"value": 222208', '"value": 1000', "1000 asked for"),
    "half a warp": ('"block": [256,', '"block": [272,', "272 threads"),
    "an odd address": ('"offset": 0', '"offset": 8', "starts at a multiple"),
    "A twice": ('"tensor": "b"', '"tensor": "a"', "two different tensor maps"),
    "an unknown tensor": ('"tensor": "d"', '"tensor": "null"', "missing or one too many"),
    "a failure": ('"status": 0', '"status": 1797', "the call returned 1797"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name) -> None:
    right, wrong, finding = MISTAKES[name]
    assert right in sample("launch")
    record = LaunchRecord.of_output(SHAPE, sample("launch").replace(right, wrong))
    assert any(finding in line for line in check_launch(record, INSTANCE))


def test_a_kernel_that_launches_nothing_is_noticed() -> None:
    text = "\n".join(line for line in sample("launch").splitlines() if '"launch"' not in line)
    record = LaunchRecord.of_output(SHAPE, text)
    assert check_launch(record, INSTANCE) == ("nothing was launched",)


def test_a_residual_has_a_map_and_an_activation_has_none() -> None:
    with_residual = dataclasses.replace(INSTANCE, residual=True)
    assert check_launch(launch(), with_residual) == (
        "tensor maps of residual are missing or one too many",
    )
    assert not check_launch(launch(), dataclasses.replace(INSTANCE, activation=Activation.GELU))
