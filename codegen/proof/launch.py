"""Level 2: what a compiled GEMM asks of a GPU, recorded on a machine without one.

The object file of a kernel is linked with ``recorder.cpp``, a CUDA runtime that runs nothing and
writes down what it is asked for: tensor maps (descriptors of the tensor memory accelerator) and the
launch. So it is the code of the real library that speaks; :mod:`.contract` judges what it says.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.cutlass.library import GemmLibrary
from fpcompiler.codegen.cutlass.record import parse_instance
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.problem import BlockScale
from fpcompiler.codegen.proof.host_reference import cuda_headers
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options

__all__ = [
    "LaunchShape", "LaunchRecord", "TensorMap", "MapType", "Swizzle", "record_launch",
    "why_no_recorder",
]  # fmt: skip

_SOURCE: Final = Path(__file__).with_name("recorder.cpp")
_FLAGS: Final = ("-std=c++17", "-O1")
_SECONDS: Final = 60.0

_ATTRIBUTES: Final = {8: "max_dynamic_shared_memory", 14: "non_portable_cluster"}
"""Values of ``cudaFuncAttribute`` that are set."""


class MapType(enum.IntEnum):
    """Values of ``CUtensorMapDataType`` that GEMMs use (CUDA driver API)."""

    UINT8 = 0
    UINT16 = 1
    FLOAT16 = 6
    FLOAT32 = 7
    BFLOAT16 = 9
    U4_PACKED = 13
    """``16U4_ALIGN8B``: packed in shared memory too."""
    U4_UNPACKED = 14
    """``16U4_ALIGN16B``: with a gap, so that 16 values take 16 bytes."""
    U6_UNPACKED = 15
    """``16U6_ALIGN16B``: likewise."""

    @property
    def bits(self) -> int:
        """Bits of an element in memory."""
        narrow = {MapType.U4_PACKED: 4, MapType.U4_UNPACKED: 4, MapType.U6_UNPACKED: 6}
        wide = {MapType.UINT8: 8, MapType.FLOAT32: 32}
        return {**narrow, **wide}.get(self, 16)

    @property
    def shared_bits(self) -> int:
        """Bits that an element takes in shared memory."""
        return 8 if self.unpacks else self.bits

    @property
    def unpacks(self) -> bool:
        """Whether elements take more room in shared memory."""
        return self in (MapType.U4_UNPACKED, MapType.U6_UNPACKED)


class Swizzle(enum.IntEnum):
    """Values of ``CUtensorMapSwizzle``: within how many bytes chunks change their places."""

    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3

    @property
    def span(self) -> int:
        """The bytes; 0 for none."""
        return {Swizzle.NONE: 0, Swizzle.B32: 32, Swizzle.B64: 64, Swizzle.B128: 128}[self]


@dataclass(frozen=True)
class LaunchShape:
    """What a GEMM is called with.

    Attributes:
        m: Rows of A.
        n: Rows of B, padded.
        k: Values in a row of either, padded.
        sms: SMs of the GPU; by default those of a B200.
    """

    m: int
    n: int
    k: int
    sms: int = 148

    def __str__(self) -> str:
        """Return the sizes, such as ``300x520x640``."""
        return f"{self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class TensorMap:
    """One descriptor, as ``cuTensorMapEncodeTiled`` was asked to encode it.

    Attributes:
        tensor: Whose: ``a``, ``a_scales``, ``b``, ``b_scales``, ``d`` or ``residual``.
        offset: Bytes from the tensor's address to where it starts.
        type: The type of elements.
        sizes: Elements along each axis, the contiguous axis first.
        strides: Bytes along each axis but the first.
        box: Elements along each axis that one copy moves.
        steps: Distances of the elements that are moved; ones.
        interleave: 0 for none.
        swizzle: How shared memory is permuted.
    """

    tensor: str
    offset: int
    type: MapType
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    interleave: int
    swizzle: Swizzle

    @classmethod
    def of_event(cls, event: Mapping[str, Any]) -> TensorMap:
        """Return the map that the recorder printed.

        Raises:
            ValueError: If its type or swizzle is none that GEMMs use.
        """
        lists = {name: tuple(event[name]) for name in ("sizes", "strides", "box", "steps")}
        kinds = {"type": MapType(event["type"]), "swizzle": Swizzle(event["swizzle"])}
        return cls(**{**event, **lists, **kinds})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("sizes", "strides", "box", "steps")}
        return {**asdict(self), **lists, "type": self.type.name, "swizzle": self.swizzle.name}


@dataclass(frozen=True)
class LaunchRecord:
    """What one call of a GEMM asked for.

    Attributes:
        shape: What it was called with.
        status: What it returned; 0 for success.
        maps: Its tensor maps. Equal ones are one: kernels of Sm100 encode all for each of two
            sizes of clusters that the GPU may choose from.
        grid: Thread blocks along x, y and z; empty if nothing was launched.
        cluster: Thread blocks of a cluster.
        block: Threads of a block.
        shared_memory: Bytes per thread block.
        attributes: What was set of the function: ``max_dynamic_shared_memory``,
            ``non_portable_cluster``.
    """

    shape: LaunchShape
    status: int
    maps: tuple[TensorMap, ...] = ()
    grid: tuple[int, ...] = ()
    cluster: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared_memory: int = 0
    attributes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of_output(cls, shape: LaunchShape, text: str) -> LaunchRecord:
        """Return the record in what the recorder printed.

        Raises:
            TargetError: If it is no such text, or there was more than one launch.
        """
        try:
            events = [json.loads(line) for line in text.splitlines()]
            return cls._of_events(shape, events)
        except (ValueError, KeyError, TypeError) as error:
            raise TargetError(f"the recorder printed something else: {text[:300]!r}") from error

    @classmethod
    def _of_events(cls, shape: LaunchShape, events: list[dict[str, Any]]) -> LaunchRecord:
        groups: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            groups.setdefault(event.pop("event"), []).append(event)
        (end,) = groups["return"]
        launches = groups.get("launch", [])
        if len(launches) > 1:
            raise TargetError(f"one call launched {len(launches)} kernels")
        launch: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for event in launches
            for name, value in event.items()
        }
        maps = (TensorMap.of_event(event) for event in groups.get("tensor_map", []))
        attributes = {
            _ATTRIBUTES.get(event["attribute"], f"attribute_{event['attribute']}"): event["value"]
            for event in groups.get("function_attribute", [])
        }
        return cls(
            shape, end["status"], tuple(dict.fromkeys(maps)),
            attributes=tuple(sorted(attributes.items())), **launch,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "shape": asdict(self.shape),
            "status": self.status,
            "maps": [one.to_json() for one in self.maps],
            "grid": list(self.grid),
            "cluster": list(self.cluster),
            "block": list(self.block),
            "shared_memory": self.shared_memory,
            "attributes": dict(self.attributes),
        }


def why_no_recorder(built: BuiltKernel) -> str:
    """Return what is missing to record a kernel's launches; empty if nothing is."""
    if not built.object.is_file():
        return "its object file is not beside it; build it here"
    if not shutil.which("g++"):
        return "there is no g++"
    if cuda_headers() is None:
        return "there are no headers of the CUDA toolkit: install nvcc 13"
    return ""


def record_launch(
    built: BuiltKernel, shape: LaunchShape, options: Options | None = None
) -> LaunchRecord:
    """Return what a call of a compiled GEMM would ask of a GPU.

    The kernel's own code runs, in a process of its own.

    Args:
        built: The kernel, with its object file.
        shape: What to call it with. Its tensors are never read or written.
        options: Where what is linked is kept; by default as the environment says.

    Raises:
        DependencyError: If the compiler, its headers or the object file are missing.
        TargetError: If the kernel uses functions of the runtime that are not recorded, crashes, or
            takes longer than a minute.
    """
    reason = why_no_recorder(built)
    if reason:
        raise DependencyError(f"{built.metadata['name']} cannot be recorded: {reason}.")
    cache = (options or Options.from_env()).cache
    program = cache / "proof" / f"recorder-{_key(built)}"
    if not program.is_file():
        _link(built, program)
    instance = parse_instance(built.metadata["description"])
    workspace = GemmLibrary(built.path).workspace(shape.m, shape.n, shape.k, shape.sms)
    return LaunchRecord.of_output(shape, _run(program, instance, shape, workspace))


def _run(program: Path, instance: Instance, shape: LaunchShape, workspace: int) -> str:
    has_scales = instance.scale is not BlockScale.NONE
    numbers = (shape.m, shape.n, shape.k, shape.sms, workspace, has_scales, instance.residual)
    command = [str(program), *(str(int(number)) for number in numbers)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"{instance.name} did not return within {_SECONDS:.0f} s.") from error
    if done.returncode:
        raise TargetError(
            f"{instance.name} ended with {done.returncode} while it was recorded: "
            f"{done.stderr.strip()[-500:]}"
        )
    return done.stdout


def _link(built: BuiltKernel, program: Path) -> None:
    headers = cuda_headers()
    assert headers is not None
    program.parent.mkdir(parents=True, exist_ok=True)
    # Another process may do the same: each has its own file, and the last name given wins.
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        linked = Path(folder) / "recorder"
        includes = (f"-I{headers}", f"-I{_abi().parent}")
        command = ["g++", *_FLAGS, *includes, str(_SOURCE), str(built.object), "-o", str(linked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(
                f"{built.metadata['name']} does not link with the recorder:\n{done.stderr[-2000:]}"
            )
        os.replace(linked, program)


def _key(built: BuiltKernel) -> str:
    """Return a hash of everything that is linked."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for file in (_SOURCE, _abi(), _abi().with_name("quantize_abi.h"), built.object):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _abi() -> Path:
    folder = resources.files("fpcompiler.codegen.cutlass") / "templates"
    return Path(str(folder / "kernel_abi.h"))
