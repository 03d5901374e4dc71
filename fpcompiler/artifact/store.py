"""Saving and reading artifacts; a file is verified as a whole before anything in it is used."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from torch import Tensor

from fpcompiler.arguments import PATH, require_type
from fpcompiler.artifact import foreign, jsonfile, tensors
from fpcompiler.artifact.check import check
from fpcompiler.artifact.container import Buffer, Entry, Writer, check_layout, read_directory
from fpcompiler.artifact.damage import DamagedFileError
from fpcompiler.artifact.kernels import KernelIndex
from fpcompiler.artifact.manifest import Manifest, Sum, package_versions
from fpcompiler.artifact.pages import Pages
from fpcompiler.errors import ArtifactError
from fpcompiler.plan import Plan

MANIFEST: Final = "manifest.json"
REQUIRED: Final = (
    "plan.json", "weights.safetensors", "golden.safetensors", "graph.mlir", "recipe.json",
)  # fmt: skip
"""Members besides the manifest that every artifact has."""

_KERNEL: Final = re.compile(r"kernels/[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_GOLDEN: Final = re.compile(r"(\d{1,6})\.(in|out)\.(\d{1,6})")
_JSON_LIMIT: Final = 256 << 20
_TEXT_LIMIT: Final = 256 << 20
_HASH_PIECE: Final = 16 << 20
_DESCRIPTORS: Final = Path("/proc/self/fd")


@dataclass(frozen=True)
class Golden:
    """One recorded call: the tensors of its inputs and outputs, in the order of the plan."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Artifact:
    """A compiled model: everything that runs it, and what tells how it came about.

    Attributes:
        plan: The program.
        tensors: The tensors that the plan names.
        scheme: Exact text of the scheme.
        pipeline: Text of the pipeline.
        targets: What it runs on.
        golden: Recorded calls, one after the other from the initial state.
        graph: The program as MLIR text, for people; it is never executed.
        recipe: The recipe of the compilation, as JSON values.
        kernels: Files for targets that need some, by name without folder; see
            :mod:`fpcompiler.artifact.kernels`.
        packages: Versions of the packages that compiled it.
        pages: The memory of the file that it was read from.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    scheme: str = ""
    pipeline: str = ""
    targets: tuple[str, ...] = ("reference",)
    golden: tuple[Golden, ...] = ()
    graph: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Buffer] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=package_versions)
    pages: Pages = field(default_factory=Pages, compare=False, repr=False)


def save(path: str | os.PathLike[str], artifact: Artifact) -> None:
    """Write an artifact; at every moment there is either the old file at the path or the new one.

    Raises:
        ArtifactError: If the artifact is not consistent, or the file cannot be written.
        OptionError: If the path is none.
    """
    require_type("the path", path, PATH, "that of a file, such as save('model.fpc')")
    target = Path(path)
    _raise_problems(f"{target} was not written", check(artifact.plan, artifact.tensors))
    try:
        with _new_file(target) as file:
            _write(file, artifact)
        _sync_folder(target.parent)
    except OSError as error:
        raise ArtifactError(
            f"{target} could not be written: {error.strerror or error}. Choose a folder that "
            "exists, is writable and has room."
        ) from error


def read(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact. Its tensors are views of the file, mapped into memory.

    A program that writes into the file in place while it is in use changes the tensors; to replace
    it, write another file and rename it, as :func:`save` does.

    Raises:
        ArtifactError: If the file is not a whole and unchanged artifact of this format version.
        OptionError: If the path is none.
    """
    require_type("the path", path, PATH, "that of a file, such as load('model.fpc')")
    try:
        return _parse(_map(Path(path)))
    except ArtifactError as error:
        message = f"{os.fspath(path)} is not a usable artifact: {error}"
        raise ArtifactError(message) from error


def _write(file: BinaryIO, artifact: Artifact) -> None:
    writer = Writer(file)
    for name, pieces in _members(artifact):
        writer.add(name, pieces)
    manifest = Manifest(
        package_versions().get("fpcompiler", "checkout, not installed"),
        artifact.scheme,
        artifact.pipeline,
        artifact.packages,
        artifact.targets,
        {entry.name: Sum(entry.sha256, entry.size) for entry in writer.entries},
    )
    entry = writer.add(MANIFEST, [jsonfile.dump(manifest.to_json())])
    writer.close(entry.sha256.encode())


def _members(artifact: Artifact) -> Iterator[tuple[str, Iterable[Buffer]]]:
    yield "plan.json", [jsonfile.dump(artifact.plan.to_json())]
    yield "weights.safetensors", tensors.pieces(artifact.tensors)
    yield "golden.safetensors", tensors.pieces(_golden_tensors(artifact.golden))
    yield "graph.mlir", [artifact.graph.encode()]
    yield "recipe.json", [jsonfile.dump(dict(artifact.recipe))]
    for name, data in artifact.kernels.items():
        if not _KERNEL.fullmatch(f"kernels/{name}"):
            raise ArtifactError(f"a kernel cannot be stored under the name {name!r}.")
        yield f"kernels/{name}", [data]


def _golden_tensors(golden: Sequence[Golden]) -> dict[str, Tensor]:
    named = {}
    for call, case in enumerate(golden):
        for side, values in (("in", case.inputs), ("out", case.outputs)):
            named.update({f"{call}.{side}.{i}": value for i, value in enumerate(values)})
    return named


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of the target when it is complete, and vanishes otherwise.

    It has no name before, so that a process that is killed leaves nothing. On systems without such
    files, and for a moment where there is an old file to replace, it has another name.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        unnamed = _unnamed_file(target.parent)
        with unnamed or temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if unnamed and _link(file, target):
                return
            if unnamed:
                _link(file, temporary)
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # Usually it is not there any more.
            temporary.unlink()


def _unnamed_file(folder: Path) -> BinaryIO | None:
    """Return a file without a name in a folder, or None where the system has none."""
    if not (hasattr(os, "O_TMPFILE") and _DESCRIPTORS.is_dir()):
        return None
    try:
        return open(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    except OSError:  # If the folder itself cannot be used, opening a file with a name says why.
        return None


def _link(file: BinaryIO, name: Path) -> bool:
    """Give a file a name; return whether it was free."""
    descriptor = file.fileno()
    try:
        # With a folder given, which an absolute path does not need, Python follows the link.
        os.link(_DESCRIPTORS / str(descriptor), name.absolute(), src_dir_fd=descriptor)
    except FileExistsError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DamagedFileError("the file is empty.")
            # Private pages: torch wants a writable buffer, and nothing must ever reach the file.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ArtifactError(
            f"it cannot be opened: {error.strerror or error}. Check the path."
        ) from error


def _parse(buffer: mmap.mmap) -> Artifact:
    pages = Pages(buffer)
    with memoryview(buffer) as view:
        foreign.refuse(view)
        entries, comment = read_directory(view)
        members = {entry.name: entry for entry in entries}
        _check_names(members)
        manifest = _read_manifest(view, members[MANIFEST], comment)
        _check_members(view, members, manifest, pages)
        check_layout(view, entries, comment)
        plan = Plan.from_json(_json(view, members["plan.json"]))
        recipe = _json(view, members["recipe.json"])
        graph = _text(view, members["graph.mlir"])
        kernels = {
            name.removeprefix("kernels/"): bytes(_data(view, entry))
            for name, entry in members.items()
            if name.startswith("kernels/")
        }
        KernelIndex.of(kernels)
    weights = _tensors(buffer, members["weights.safetensors"])
    _raise_problems("its plan and its tensors do not fit", check(plan, weights))
    return Artifact(
        plan=plan,
        tensors=weights,
        scheme=manifest.scheme,
        pipeline=manifest.pipeline,
        targets=manifest.targets,
        golden=_read_golden(_tensors(buffer, members["golden.safetensors"])),
        graph=graph,
        recipe=recipe,
        kernels=kernels,
        packages=manifest.packages,
        pages=pages,
    )


def _check_names(members: Mapping[str, Entry]) -> None:
    for name in members:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise DamagedFileError(
                f"the member {name!r} points outside of the file; it is refused."
            )
    foreign.refuse_zip([*members])
    for name in members:
        if name not in (MANIFEST, *REQUIRED) and not _KERNEL.fullmatch(name):
            raise DamagedFileError(f"it has the member {name[:80]!r}, which no artifact has.")
    missing = [name for name in REQUIRED if name not in members]
    if missing:
        raise DamagedFileError(f"the member {missing[0]!r} is missing.")


def _read_manifest(view: memoryview, entry: Entry, comment: bytes) -> Manifest:
    data = _data(view, entry)
    if hashlib.sha256(data).hexdigest().encode() != comment:
        raise DamagedFileError(
            "manifest.json does not have the checksum that stands at the end of the file: one of "
            "them was changed."
        )
    return Manifest.from_json(jsonfile.parse(data, MANIFEST, _JSON_LIMIT))


def _check_members(
    view: memoryview, members: Mapping[str, Entry], manifest: Manifest, pages: Pages
) -> None:
    listed, present = {*manifest.members}, {*members} - {MANIFEST}
    for name in sorted(listed ^ present):
        where = "the manifest but not in the file" if name in listed else "the file only"
        raise DamagedFileError(f"the member {name[:80]!r} is in {where}.")
    if [*members] != [*manifest.members, MANIFEST]:
        raise DamagedFileError("its members do not stand in the order in which they were written.")
    for name, expected in manifest.members.items():
        entry = members[name]
        if entry.size != expected.size:
            raise DamagedFileError(
                f"the member {name!r} has {entry.size} bytes; it was written with {expected.size}."
            )
        if _sha256(view, entry, pages) != expected.sha256:
            raise DamagedFileError(f"the member {name!r} was changed: its checksum is another one.")


def _sha256(view: memoryview, entry: Entry, pages: Pages) -> str:
    digest = hashlib.sha256()
    end = entry.offset + entry.size
    for start in range(entry.offset, end, _HASH_PIECE):
        piece = min(_HASH_PIECE, end - start)
        digest.update(view[start : start + piece])
        pages.release(start, piece)
    return digest.hexdigest()


def _data(view: memoryview, entry: Entry) -> memoryview:
    return view[entry.offset : entry.offset + entry.size]


def _json(view: memoryview, entry: Entry) -> dict[str, Any]:
    return jsonfile.parse(_data(view, entry), entry.name, _JSON_LIMIT)


def _text(view: memoryview, entry: Entry) -> str:
    if entry.size > _TEXT_LIMIT:
        raise DamagedFileError(f"{entry.name} has {entry.size} bytes; that is no artifact.")
    try:
        return bytes(_data(view, entry)).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{entry.name} is no text.") from error


def _tensors(buffer: mmap.mmap, entry: Entry) -> dict[str, Tensor]:
    return tensors.views(buffer, entry.offset, entry.size, entry.name)


def _read_golden(named: Mapping[str, Tensor]) -> tuple[Golden, ...]:
    sides: dict[tuple[int, str], dict[int, Tensor]] = {}
    for name, tensor in named.items():
        match = _GOLDEN.fullmatch(name)
        if not match:
            raise DamagedFileError(
                f"golden.safetensors has the tensor {name[:80]!r}, which no call has."
            )
        sides.setdefault((int(match[1]), match[2]), {})[int(match[3])] = tensor
    calls = range(1 + max((call for call, _ in sides), default=-1))
    return tuple(
        Golden(_in_order(sides.get((call, "in"), {})), _in_order(sides.get((call, "out"), {})))
        for call in calls[: len(named)]
    )


def _in_order(values: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
    return tuple(values[index] for index in sorted(values))


def _raise_problems(what: str, problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        some = "; ".join(problems[:3])
        raise ArtifactError(f"{what}: {some}{more}. Compile the model again.")
