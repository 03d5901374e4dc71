import io
import json
import mmap
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fpcompiler.artifact import Artifact, check, read, save, store, tensors
from fpcompiler.errors import ArtifactError, FpcompilerError
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.executor import Executor
from tests.kernel_files import kernel_files
from tests.mutations import members
from tests.plans import Mlp, mlp_artifact, with_golden


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    torch.manual_seed(0)
    return with_golden(
        replace(
            mlp_artifact(),
            graph="module {}\n",
            recipe={"scheme": "w4a6"},
            kernels=kernel_files(b"\x7fELF"),
            packages={"torch": "2.13.0"},
        ),
        torch.randn(2, 64),
        torch.randn(1, 64),
    )


@pytest.fixture(scope="module")
def data(artifact, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("artifact") / "model.fpc"
    save(path, artifact)
    return path.read_bytes()


@pytest.fixture
def path(data, tmp_path) -> Path:
    path = tmp_path / "model.fpc"
    path.write_bytes(data)
    return path


def test_what_is_saved_is_read(artifact, path):
    back = read(path)
    for name in ("scheme", "pipeline", "targets", "graph", "recipe", "kernels", "packages"):
        assert getattr(back, name) == getattr(artifact, name)
    assert back.plan.to_json() == artifact.plan.to_json()
    assert list(back.tensors) == list(artifact.tensors)
    assert all(torch.equal(back.tensors[key], t) for key, t in artifact.tensors.items())
    for ours, theirs in zip(back.golden, artifact.golden, strict=True):
        assert all(map(torch.equal, ours.inputs + ours.outputs, theirs.inputs + theirs.outputs))


def test_the_same_model_gives_the_same_bytes(artifact, data, tmp_path):
    save(tmp_path / "again.fpc", artifact)
    assert (tmp_path / "again.fpc").read_bytes() == data


def test_any_zip_tool_reads_it_and_members_are_stored_and_aligned(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0


def test_the_safetensors_library_reads_the_weights(artifact, data):
    loaded = safetensors.torch.load(members(data)[0]["weights.safetensors"])
    assert all(torch.equal(loaded[key], t) for key, t in artifact.tensors.items())


def test_tensors_are_aligned_views_of_the_file_and_cannot_change_it(path, data):
    weights = read(path).tensors
    assert all(t.data_ptr() % 64 == 0 for t in weights.values() if t.numel())
    weights["head.weight"].zero_()
    assert path.read_bytes() == data
    assert read(path).tensors["head.weight"].any()


def test_the_file_may_be_replaced_while_it_is_mapped(path, artifact):
    old = read(path).tensors["head.weight"]
    save(path, replace(artifact, scheme="other"))
    assert read(path).scheme == "other"
    assert torch.equal(old, artifact.tensors["head.weight"])


@pytest.mark.parametrize("dtype", list(tensors._DTYPES.values()), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 7)])
def test_every_dtype_and_shape_survives(dtype, shape):
    value = (torch.randn(shape) * 3).abs().to(dtype)
    other = torch.randn(3)
    raw = b"".join(tensors.pieces({"a": value, "b": other.expand(2, 3).t(), "c": value}))
    loaded = safetensors.torch.load(raw)
    buffer = mmap.mmap(-1, len(raw) + 64)
    buffer[64:] = raw
    views = tensors.views(buffer, 64, len(raw), "it")
    assert list(views) == ["a", "b", "c"]
    for found in (views, loaded):
        assert found["a"].dtype == dtype
        assert found["a"].shape == shape
        assert torch.equal(found["a"], value)
        assert torch.equal(found["b"], other.expand(2, 3).t())


def mapped(raw: bytes) -> mmap.mmap:
    buffer = mmap.mmap(-1, len(raw))
    buffer[:] = raw
    return buffer


def test_large_zeros_take_no_bytes():
    cache, other = torch.zeros(2, 1024, 1024, dtype=torch.bfloat16), torch.zeros(1024, 1024)
    other[1023, 1023] = -0.0
    raw = b"".join(tensors.pieces({"cache": cache, "small": torch.zeros(5), "other": other}))
    assert len(raw) < other.nbytes + 2000
    found = tensors.views(mapped(raw), 0, len(raw), "it")
    assert {*found} == {"cache", "small", "other"}
    assert found["cache"].dtype == torch.bfloat16
    assert found["cache"].shape == cache.shape
    assert not found["cache"].any()
    assert torch.equal(found["other"].view(torch.int32), other.view(torch.int32))
    assert {*safetensors.torch.load(raw)} >= {"small", "other"}


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({"other": "{}"}, "metadata that no artifact has"),
        ({"zeros": 3}, "metadata that no artifact has"),
        ("zeros", "metadata that no artifact has"),
        ({"zeros": "["}, "the zeros of it"),
        ({"zeros": '{"z": []}'}, "needs a dtype and a shape"),
        ({"zeros": '{"z": {"dtype": "F99", "shape": [1]}}'}, "unknown dtype 'F99'"),
        ({"zeros": '{"z": {"dtype": "F32", "shape": [0, 4000000000000000000, 9]}}'}, "would take"),
        ({"zeros": '{"__padding__.1": {"dtype": "U8", "shape": [1]}}'}, "padding is no zeros"),
        ({"zeros": '{"z": {"dtype": "U8", "shape": [-1]}}'}, "not a list of sizes"),
        ({"zeros": '{"z": {"dtype": "F32", "shape": [1099511627777]}}'}, "would take"),
        ({"zeros": '{"a": {"dtype": "U8", "shape": [1]}}'}, "there twice"),
    ],
)
def test_zeros_of_damaged_headers_are_refused(metadata, cause):
    header = {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "__metadata__": metadata}
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + b"ab"
    with pytest.raises(ArtifactError, match=cause):
        tensors.views(mapped(raw), 0, len(raw), "it")


# Saving


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, data, artifact, monkeypatch):
    def fail(tensors):
        yield b"some bytes"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.tensors, "pieces", fail)
    with pytest.raises(ArtifactError, match=r"could not be written: No space left .* has room"):
        save(path, artifact)
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["model.fpc"]


def test_an_interrupted_save_leaves_nothing(tmp_path, artifact, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "model.fpc", artifact)
    assert list(tmp_path.iterdir()) == []


def test_saving_to_a_folder_that_does_not_exist_is_refused(tmp_path, artifact):
    with pytest.raises(ArtifactError, match="Choose a folder that exists"):
        save(tmp_path / "no" / "model.fpc", artifact)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="could not be written"):
        save(tmp_path / "file" / "model.fpc", artifact)
    with pytest.raises(ArtifactError, match="could not be written"):
        save(tmp_path, artifact)


def test_an_inconsistent_artifact_is_not_written(tmp_path, artifact):
    broken = replace(artifact, tensors={**artifact.tensors, "up.w1": torch.zeros(96, 1)})
    with pytest.raises(ArtifactError, match=r"model.fpc was not written: layer 'up': the scale"):
        save(tmp_path / "model.fpc", broken)
    odd = {"calls": torch.zeros(3, dtype=torch.float8_e5m2)}
    with pytest.raises(
        ArtifactError, match=r"tensor 'calls': torch.float8_e5m2 .* cannot be stored"
    ):
        save(tmp_path / "x", replace(artifact, plan=PLAIN, tensors=odd))
    with pytest.raises(
        ArtifactError, match=r"a kernel cannot be stored under the name '\.\./evil'"
    ):
        save(tmp_path / "x", replace(artifact, kernels={"../evil": b""}))
    assert list(tmp_path.iterdir()) == []


PLAIN = replace(mlp_artifact().plan, steps=(), constants={}, outputs=("x", "x"), stores=())


def problems(artifact: Artifact, key: str, value: Tensor) -> list[str]:
    return check(artifact.plan, {**artifact.tensors, key: value})


def test_codes_and_scales_are_checked(artifact):
    good = artifact.tensors
    assert check(artifact.plan, good) == []

    def problem(key: str, value: Tensor) -> str:
        found = problems(artifact, key, value)
        assert len(found) == 2  # The layer is called twice.
        assert found[0] == found[1]
        return found[0]

    codes, rows, blocks = good["up.w0"], good["up.w1"], good["up.w2"]
    assert "take uint8 [N, 32]" in problem("up.w0", codes[:, :-1])
    assert "take uint8 [N, 32]" in problem("up.w0", codes.view(torch.int8))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        wrong = rows.clone()
        wrong[3] = bad
        assert "not finite and positive" in problem("up.w1", wrong)
    assert "not float32 [96, 1]" in problem("up.w1", rows[:5])
    assert "not float32 [96, 1]" in problem("up.w1", rows.double())
    assert "not uint8 [96, 2]" in problem("up.w2", blocks[:, :1])
    assert "not uint8 [96, 2]" in problem("up.w2", blocks.float())
    assert "not finite and positive" in problem("up.w2", torch.full_like(blocks, 255))
    assert "the bias is float32 [5] for 96 rows" in problem("up.bias", torch.zeros(5))
    missing = {key: value for key, value in good.items() if key != "down.w2"}
    assert check(artifact.plan, missing) == [
        "the plan names the tensor 'down.w2', which is missing"
    ]


def test_scales_in_e4m3_and_codes_of_eight_bits_are_checked():
    nvfp4 = mlp_artifact(weight="f4E2M1FN@tensor:f32/block16:f8E4M3FN", activation="")
    assert check(nvfp4.plan, nvfp4.tensors) == []
    for code in (0, 127, 128, 200):
        scales = torch.full_like(nvfp4.tensors["up.w2"], code)
        assert "not finite and positive" in problems(nvfp4, "up.w2", scales)[0]
    fp8 = mlp_artifact(weight="f8E4M3FN@row:f32", activation="")
    assert check(fp8.plan, fp8.tensors) == []
    codes = fp8.tensors["up.w0"].clone()
    codes[0, 0] = 0xFF
    assert "some codes of f8E4M3FN are NaN" in problems(fp8, "up.w0", codes)[0]


def test_steps_with_wrong_operands_are_checked(artifact):
    def problem(**changes) -> str:
        step = next(s for s in artifact.plan.steps if s.op == "fpc.linear")
        args = list(step.args)
        for index, value in changes.items():
            args[int(index[1:])] = value
        steps = [replace(step, args=tuple(args)) if s is step else s for s in artifact.plan.steps]
        return check(replace(artifact.plan, steps=tuple(steps)), artifact.tensors)[0]

    assert "There is no format 'f5E2M2'" in problem(_4="f5E2M2@row:f32")
    assert "x_operand is 3" in problem(_3=3)
    assert "w_operand is None" in problem(_4=None)
    assert "K is 'x'" in problem(_5="x")
    assert "there are 1 scales for the 2 levels" in problem(_1=[{"v": "up.w0"}, {"v": "up.w1"}])


def with_arguments(artifact: Artifact, kernel: str, *more: str) -> Artifact:
    """Return an artifact whose first layer has further arguments."""
    first = next(s for s in artifact.plan.steps if s.op == "fpc.linear")
    changed = replace(first, args=(*first.args, *more), kernel=kernel)
    steps = tuple(changed if step is first else step for step in artifact.plan.steps)
    return replace(artifact, plan=replace(artifact.plan, steps=steps), golden=())


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_a_layer_may_have_an_activation_or_be_from_before_there_were_any(artifact, path, kernel):
    def output(*more: str) -> Tensor:
        save(path, with_arguments(artifact, kernel, *more))
        back = read(path)
        assert check(back.plan, back.tensors) == []
        found: dict[str, Tensor] = {}
        executor = Executor(back.plan, back.tensors)
        executor.observed(lambda step, value: found.setdefault(step.layer, value), x)
        return found["up"]

    x = torch.randn(3, 64)
    before = output()
    assert torch.equal(output(""), before)
    activated = torch.nn.functional.silu(before)
    assert torch.allclose(output("silu"), activated, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(activated, before, atol=0.1)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("more", [("swish",), ("silu", "silu")])
def test_an_activation_that_is_none_is_an_error_that_names_the_layer(artifact, kernel, more):
    changed = with_arguments(artifact, kernel, *more)
    with pytest.raises(FpcompilerError, match="layer 'up'"):
        Executor(changed.plan, changed.tensors).run(torch.randn(3, 64))


def test_a_dequantized_constant_is_checked(artifact):
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    step = Step(
        "fpc.dequantize",
        ([{"v": "codes"}, {"v": "scale"}], "f4E2M1FN@row:f32", {"dtype": "float32"}),
        ("w",),
    )
    plan = replace(PLAIN, steps=(step,), constants={"codes": "codes", "scale": "scale"})
    good = {"codes": codes, "scale": torch.ones(4, 1), **artifact.tensors}
    assert check(plan, good) == []
    assert "not float32 [4, 1]" in check(plan, {**good, "scale": torch.ones(4)})[0]
    assert "the codes are float32 [4, 32]" in check(plan, {**good, "codes": codes.float()})[0]


@pytest.mark.parametrize(
    ("op", "before"),
    [("fpc.quantize", ()), ("fpc.fused_quantize", (None, None, None, None, "relu", 0.0))],
)
def test_the_operand_of_a_quantizer_is_checked(artifact, op, before):
    def problems(operand: object) -> list[str]:
        step = Step(op, ({"v": PLAIN.placeholders[0].name}, *before, operand, "up"), ("q", "s"))
        return check(replace(PLAIN, steps=(step, *PLAIN.steps)), artifact.tensors)

    assert problems("f6E2M3FN@token:f32") == []
    assert "There is no format 'f5E2M2'" in problems("f5E2M2@token:f32")[0]
    assert "operand is 7" in problems(7)[0]


def test_a_large_model_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_HASH_PIECE", 100)
    torch.manual_seed(1)
    save(tmp_path / "model.fpc", mlp_artifact(Mlp(32, 32)))
    assert isinstance(read(tmp_path / "model.fpc").plan, Plan)
