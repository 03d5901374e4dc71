"""Files that are no whole, unchanged artifact: each is refused, with the cause and the way out."""

import io
import json
import mmap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fpcompiler.artifact import Artifact, read, save, tensors
from fpcompiler.artifact.manifest import FORMAT_VERSION
from fpcompiler.errors import ArtifactError
from tests.kernel_files import kernel_files
from tests.mutations import members, packed
from tests.plans import mlp_artifact, with_golden


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


def resealed(data: bytes, **changes: bytes) -> bytes:
    """Return the artifact with other members, all checksums made to agree."""
    rows, _ = members(data)
    rows.update({store_name(name): value for name, value in changes.items()})
    return sealed(rows)


def store_name(name: str) -> str:
    return {"weights": "weights.safetensors", "golden": "golden.safetensors"}.get(
        name, f"{name}.json"
    )


def sealed(rows: dict[str, bytes], manifest: dict | None = None) -> bytes:
    from hashlib import sha256

    manifest = manifest or json.loads(rows["manifest.json"])
    sums = {n: {"sha256": sha256(d).hexdigest(), "size": len(d)} for n, d in rows.items()}
    del sums["manifest.json"]
    text = json.dumps({**manifest, "members": sums}).encode()
    return packed([*{**rows, "manifest.json": text}.items()], sha256(text).hexdigest().encode())


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "other.fpc"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"other\.fpc is not a usable artifact: ") as caught:
        read(path)
    return str(caught.value)


# Refusing


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    return file.getvalue()


def exported_file() -> bytes:
    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    file = io.BytesIO()
    torch.export.save(torch.export.export(Double(), (torch.ones(2),)), file)
    return file.getvalue()


def zip_file(method: int = zipfile.ZIP_STORED, **rows: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, row in rows.items():
            archive.writestr(name, row)
    return file.getvalue()


FOREIGN = {
    "the file is empty": b"",
    "it is no zip file.": b"hello world",
    "looks like a GGUF model": b"GGUF\3\0\0\0",
    "looks like a pickle": b"\x80\x04\x95",
    "looks like a safetensors file": safetensors.torch.save({"a": torch.zeros(3)}),
    "run `git lfs pull`": b"version https://git-lfs.github.com/spec/v1\n",
    "an HTML or XML page": b"<!doctype html>",
    "looks like a NumPy .npz file": numpy_file(),
    "looks like a file of torch.save": torch_file(),
    "it has 'a.txt'": zip_file(**{"a.txt": b"a"}),
    "it has no members": zip_file(),
    "the end of the zip file is missing": zip_file(a=b"a")[:-8],
    "is compressed": zip_file(zipfile.ZIP_DEFLATED, a=b"a" * 100),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_foreign_file_is_refused_with_what_it_looks_like(tmp_path, message):
    assert message in refusal(tmp_path, FOREIGN[message])


def test_an_exported_program_is_recognised(tmp_path):
    assert "looks like a .pt2 file" in refusal(tmp_path, exported_file())


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"it cannot be opened: No such file.* Check the path"):
        read(tmp_path / "nothing.fpc")
    with pytest.raises(ArtifactError, match="it cannot be opened"):
        read(tmp_path)


def test_every_truncation_is_refused(tmp_path, data):
    for size in [*range(0, len(data), 397), *range(len(data) - 90, len(data))]:
        refusal(tmp_path, data[:size])


def test_bytes_after_the_end_are_refused(tmp_path, data):
    assert "1 bytes follow its end" in refusal(tmp_path, data + b"\0")


def test_a_changed_member_is_named(tmp_path, data):
    rows, comment = members(data)
    for name in {*rows} - {"manifest.json"}:
        changed = bytes([rows[name][0] ^ 1]) + rows[name][1:]
        message = refusal(tmp_path, packed([*{**rows, name: changed}.items()], comment))
        assert f"the member {name!r} was changed: its checksum is another one" in message


def test_a_changed_manifest_is_refused(tmp_path, data):
    rows, comment = members(data)
    rows["manifest.json"] = rows["manifest.json"].replace(b"w=", b"v=")
    message = refusal(tmp_path, packed([*rows.items()], comment))
    assert "manifest.json does not have the checksum that stands at the end" in message


def test_names_are_checked(tmp_path, data):
    rows, comment = members(data)

    def named(name: str) -> str:
        return refusal(tmp_path, packed([*rows.items(), (name, b"")], comment))

    assert "points outside" in named("../../etc/passwd")
    assert "points outside" in named("/etc/passwd")
    assert "points outside" in named("kernels\\..\\x")
    assert "which no artifact has" in named("setup.py")
    assert "which no artifact has" in named("kernels/a/b")
    assert "'kernels/new.so' is in the file only" in named("kernels/new.so")
    assert "'plan.json' is there twice" in named("plan.json")


def test_a_missing_member_is_named(tmp_path, data):
    rows, comment = members(data)
    for name in {*rows} - {"manifest.json"}:
        rest = [row for row in rows.items() if row[0] != name]
        message = refusal(tmp_path, packed(rest, comment))
        assert repr(name) in message
        assert "missing" in message or "not in the file" in message
    rest = [row for row in rows.items() if row[0] != "manifest.json"]
    assert "without manifest.json" in refusal(tmp_path, packed(rest, comment))


def test_a_newer_version_is_refused_with_the_way_out(tmp_path, data):
    rows, _ = members(data)
    manifest = {**json.loads(rows["manifest.json"]), "version": FORMAT_VERSION + 1}
    manifest["fpcompiler"] = "7.0"
    message = refusal(tmp_path, sealed(rows, manifest))
    assert "format version 2 (written by fpcompiler 7.0)" in message
    assert "Upgrade fpcompiler" in message


def test_an_encrypted_member_is_refused(tmp_path, data):
    place = data.rindex(b"PK\1\2")
    flagged = data[: place + 8] + b"\1" + data[place + 9 :]
    assert "is encrypted" in refusal(tmp_path, flagged)


def test_a_file_packed_again_is_refused(tmp_path, data):
    rows, comment = members(data)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = comment
        for name, row in rows.items():
            archive.writestr(name, row)
    assert "another program packed it again" in refusal(tmp_path, file.getvalue())


def test_sizes_that_are_not_in_the_file_are_refused(tmp_path, data):
    assert "claims to have" in refusal(tmp_path, with_end(data, count=2**40))
    assert "not within the file" in refusal(tmp_path, with_end(data, size=2**60))
    assert "not within the file" in refusal(tmp_path, with_end(data, start=2**63))


def with_end(data: bytes, **fields: int) -> bytes:
    place = data.rindex(b"PK\6\6")
    offsets = {"count": 32, "size": 40, "start": 48}
    for name, value in fields.items():
        at = place + offsets[name]
        data = data[:at] + value.to_bytes(8, "little") + data[at + 8 :]
    return data


# With all checksums right, as an attacker could make them


def header_of(data: bytes) -> tuple[dict, bytes]:
    weights = members(data)[0]["weights.safetensors"]
    size = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def with_header(data: bytes, change) -> bytes:
    header, payload = header_of(data)
    change(header)
    text = json.dumps(header).encode()
    return resealed(data, weights=len(text).to_bytes(8, "little") + text + payload)


HEADERS = {
    "unknown dtype 'F128'": lambda h: h["up.w0"].update(dtype="F128"),
    "unknown dtype '[]'": lambda h: h["up.w0"].update(dtype=[]),
    "is not a list of sizes": lambda h: h["up.w0"].update(shape=[-1]),
    "do not hold U8": lambda h: h["up.w0"].update(shape=[96, 31]),
    "bytes do not hold": lambda h: h["up.w0"].update(shape=[2**40, 2**40]),
    "should have dtype": lambda h: h["up.w0"].update(more=1),
    "overlaps another one": lambda h: h["up.w1"].update(data_offsets=[0, 96 * 4]),
    "too many entries": lambda h: h["up.w0"].update(data_offsets=[0, 1, 2]),
    "but it holds": lambda h: h.pop([*h][-1]),
    "leaves a gap": lambda h: h.pop("up.w0"),
}


@pytest.mark.parametrize("message", HEADERS)
def test_a_malformed_tensor_header_is_refused(tmp_path, data, message):
    assert message in refusal(tmp_path, with_header(data, HEADERS[message]))


def test_a_tensor_header_with_absurd_sizes_is_refused(tmp_path, data):
    for size, message in ((2**63, "is cut off"), (10**6, "is cut off")):
        weights = size.to_bytes(8, "little") + bytes(1000)
        assert message in refusal(tmp_path, resealed(data, weights=weights))
    assert "cut off" in refusal(tmp_path, resealed(data, weights=b"\0" * 7))
    big = (tensors.HEADER_LIMIT + 1).to_bytes(8, "little")
    buffer = mmap.mmap(-1, tensors.HEADER_LIMIT + 100)
    buffer[:8] = big
    with pytest.raises(ArtifactError, match="claims a header of"):
        tensors.views(buffer, 0, len(buffer), "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1, "a": 2}', "a key is there twice"),
        (b"[" * 100_000, "no JSON that fpcompiler writes"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "no JSON that fpcompiler writes"),
        (b"\xff\xfe{", "no JSON that fpcompiler writes"),
        (b"", "no JSON that fpcompiler writes"),
    ],
)
def test_other_json_is_refused(tmp_path, data, text, message):
    assert message in refusal(tmp_path, resealed(data, recipe=text))


def with_plan(data: bytes, change) -> bytes:
    plan = json.loads(members(data)[0]["plan.json"])
    change(plan)
    return resealed(data, plan=json.dumps(plan).encode())


def test_a_plan_that_does_not_fit_its_tensors_is_refused(tmp_path, data):
    def linear(plan: dict) -> list:
        return next(s for s in plan["steps"] if s["op"] == "fpc.linear")["args"]

    def missing(plan: dict) -> None:
        plan["constants"]["up.w0"] = "nothing"

    def operand(plan: dict) -> None:
        linear(plan)[4] = "f6E2M3FN@row:f32/block32:f8E8M0FNU"

    assert "the tensor 'nothing', which is missing" in refusal(tmp_path, with_plan(data, missing))
    message = refusal(tmp_path, with_plan(data, operand))
    assert "layer 'up': the weight's codes are uint8 [96, 32]" in message
