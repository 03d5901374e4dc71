"""What a file looks like that is no artifact, so that the error can say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fpcompiler.errors import ArtifactError

_ONNX: Final = "an ONNX file, for which load() has backend='onnxruntime'"

_STARTS: Final = (
    (b"GGUF", "a GGUF model"),
    (b"\x80\x02", "a pickle (a model saved by an old torch)"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x7fELF", "a program or shared library"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"ML\xefR", "MLIR bytecode"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
    (b"<", "an HTML or XML page (a download that failed?)"),
    (b"{", "a JSON file"),
    (b"module", "MLIR text"),
    *((bytes([8, version]), _ONNX) for version in range(3, 15)),
)


def refuse(view: memoryview) -> None:
    """Raise if a file does not start like a zip file.

    Raises:
        ArtifactError: Saying what the file looks like.
    """
    start = bytes(view[:64])
    if start.startswith(b"PK\3\4") or start.startswith(b"PK\5\6"):
        return
    looks = next((what for magic, what in _STARTS if start.startswith(magic)), "")
    if not looks and start[8:10] == b'{"':
        looks = "a safetensors file"
    raise _not_ours(f"it is no zip file{f'; it looks like {looks}' if looks else ''}")


def refuse_zip(names: Sequence[str]) -> None:
    """Raise if a zip file has no manifest, by the names of its members.

    Raises:
        ArtifactError: Saying what the file looks like.
    """
    if "manifest.json" not in names:
        raise _not_ours(f"it is a zip file without manifest.json{_guess(names)}")


def _not_ours(cause: str) -> ArtifactError:
    """Return the error for a file that is no artifact at all."""
    return ArtifactError(f"{cause}. Pass a file that save() of a compiled model has written.")


def _guess(names: Sequence[str]) -> str:
    tails = [name.partition("/")[2] or name for name in names]
    if names and all(name.endswith(".npy") for name in names):
        return "; it looks like a NumPy .npz file"
    if any(tail.startswith("data/aotinductor/") for tail in tails):
        return "; it looks like a package of AOTInductor, for torch._inductor.aoti_load_package"
    if "archive_format" in tails or any(tail.startswith("models/") for tail in tails):
        return "; it looks like a .pt2 file of torch.export.save"
    if "data.pkl" in tails:
        return "; it looks like a file of torch.save"
    if any(name.endswith((".dist-info/RECORD", "META-INF/MANIFEST.MF")) for name in names):
        return "; it looks like a Python wheel or a Java archive"
    some = ", ".join(repr(name[:40]) for name in names[:3])
    return f"; it has {some or 'no members'}"
