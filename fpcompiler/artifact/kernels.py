"""Compiled GPU kernels in an artifact: which files they are, and which layers they run.

The files lie side by side in ``kernels/``; ``kernels/index.json`` says what each one is. A library
is code: reading an artifact never loads one. See :mod:`fpcompiler.runtime.trust` for when that is
allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.container import Buffer
from fpcompiler.artifact.damage import DamagedFileError

INDEX: Final = "index.json"
"""Its name in ``kernels/``."""

VERSION: Final = 1

DECODE_ROWS: Final = 128
"""The most rows that the kernels called ``decode`` are used for."""

QUANTIZED_USES: Final = ("decode-quantized", "prefill-quantized")
"""What kernels are for that quantize a layer's output: for few rows, and for many."""

_LIMIT: Final = 64 << 20
_FILES: Final = ("library", "source", "log", "sass", "proof")


@dataclass(frozen=True)
class Instance:
    """One compiled library of kernels.

    Attributes:
        name: Its name among those of the target.
        role: What it does: ``gemm``, ``quantize``, ``attention``, or ``operators``: how torch calls
            the others.
            One library of operators serves all targets, and each of them names it.
        problem: What it was generated from, as JSON values; it can be generated again from that.
        files: Names in ``kernels/``: ``library``, and those there are of ``source``, ``log`` (of
            the compiler), ``sass`` (what machine code it is) and ``proof`` (what was checked).
        sha256: Checksum of the library.
    """

    name: str
    role: str
    problem: Mapping[str, Any]
    files: Mapping[str, str]
    sha256: str

    @property
    def is_packed(self) -> bool:
        """Whether it is a GEMM whose weights stay packed: fpcompiler's own, not of CUTLASS."""
        return self.role == "gemm" and "mode" in self.problem


@dataclass(frozen=True)
class LayerKernels:
    """What runs a layer on a target.

    Attributes:
        kernels: Names of instances by what they are for: ``decode`` (up to :data:`DECODE_ROWS`
            rows), ``prefill`` (more), ``quantize`` (the input), and :data:`QUANTIZED_USES`, which
            quantize the output for the layers behind.
        reason: Why there are none; the layer runs as the reference then.
    """

    kernels: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class TargetKernels:
    """The kernels for one target.

    Attributes:
        target: Its name: ``sm_100a``.
        capabilities: Compute capabilities of the devices that load them: ``("10.0",)``.
        toolchain: Versions of what compiled them.
        instances: The libraries by name.
        layers: What runs each quantized layer, by the layer's name.
    """

    target: str
    capabilities: tuple[str, ...]
    toolchain: Mapping[str, str]
    instances: Mapping[str, Instance]
    layers: Mapping[str, LayerKernels]


@dataclass(frozen=True)
class KernelIndex:
    """All kernels of an artifact, by target."""

    targets: Mapping[str, TargetKernels] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; :meth:`from_json` reads them back."""
        targets = {name: _target_json(target) for name, target in self.targets.items()}
        return {"version": VERSION, "targets": targets}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelIndex:
        """Return the index that JSON values describe.

        Raises:
            ArtifactError: If they are not an index of this version.
        """
        if {*data} != {"version", "targets"} or data["version"] != VERSION:
            raise DamagedFileError(f"kernels/{INDEX} is not an index of version {VERSION}.")
        targets = _table(data["targets"], "targets")
        return cls({name: _read_target(name, entry) for name, entry in targets.items()})

    @classmethod
    def of(cls, kernels: Mapping[str, Buffer]) -> KernelIndex:
        """Return the index among the files of an artifact, and check that the files are there.

        Raises:
            ArtifactError: If there are files without an index, or others than it names.
        """
        if not kernels:
            return cls()
        if INDEX not in kernels:
            raise DamagedFileError(f"it has kernels, but no kernels/{INDEX}.")
        index = cls.from_json(jsonfile.parse(kernels[INDEX], f"kernels/{INDEX}", _LIMIT))
        named = {name for _, instance in index.all_instances() for name in instance.files.values()}
        for name in sorted(named ^ ({*kernels} - {INDEX})):
            where = "named by the index but not there" if name in named else "not in the index"
            raise DamagedFileError(f"the file kernels/{name} is {where}.")
        for target, instance in index.all_instances():
            library = kernels[instance.files["library"]]
            if hashlib.sha256(library).hexdigest() != instance.sha256:
                raise DamagedFileError(
                    f"the library of {instance.name} for {target} is not the one of the index."
                )
        return index

    def all_instances(self) -> list[tuple[str, Instance]]:
        """Return every instance with the name of its target."""
        return [(t.target, i) for t in self.targets.values() for i in t.instances.values()]


def _target_json(target: TargetKernels) -> dict[str, Any]:
    instances = {
        i.name: {"role": i.role, "problem": i.problem, "files": dict(i.files), "sha256": i.sha256}
        for i in target.instances.values()
    }
    layers = {
        name: {"kernels": dict(row.kernels), "reason": row.reason}
        for name, row in target.layers.items()
    }
    return {
        "capabilities": list(target.capabilities),
        "toolchain": dict(target.toolchain),
        "instances": instances,
        "layers": layers,
    }


def _read_target(name: str, data: Any) -> TargetKernels:
    entry = _table(data, name, ("capabilities", "toolchain", "instances", "layers"))
    capabilities = entry["capabilities"]
    if not isinstance(capabilities, list) or not all(isinstance(c, str) for c in capabilities):
        raise _damaged(name, "capabilities")
    instances = {
        key: _read_instance(f"{name}.{key}", key, value)
        for key, value in _table(entry["instances"], f"{name}.instances").items()
    }
    layers = {
        key: _read_layer(f"{name}.{key}", value, instances)
        for key, value in _table(entry["layers"], f"{name}.layers").items()
    }
    toolchain = _texts(entry["toolchain"], f"{name}.toolchain")
    return TargetKernels(name, tuple(capabilities), toolchain, instances, layers)


def _read_instance(where: str, name: str, data: Any) -> Instance:
    entry = _table(data, where, ("role", "problem", "files", "sha256"))
    files = _texts(entry["files"], f"{where}.files")
    problem = _table(entry["problem"], f"{where}.problem")
    good = isinstance(entry["role"], str) and isinstance(entry["sha256"], str)
    if not good or "library" not in files or not {*files} <= {*_FILES}:
        raise _damaged(where, "files")
    return Instance(name, entry["role"], problem, files, entry["sha256"])


def _read_layer(where: str, data: Any, instances: Mapping[str, Instance]) -> LayerKernels:
    entry = _table(data, where, ("kernels", "reason"))
    kernels = _texts(entry["kernels"], f"{where}.kernels")
    known = all(name in instances for name in kernels.values())
    if not isinstance(entry["reason"], str) or not known:
        raise _damaged(where, "kernels")
    return LayerKernels(kernels, entry["reason"])


def _table(data: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict) or (keys is not None and {*data} != {*keys}):
        raise _damaged(where, "fields")
    return data


def _texts(data: Any, where: str) -> dict[str, str]:
    table = _table(data, where)
    if not all(isinstance(value, str) for value in table.values()):
        raise _damaged(where, "texts")
    return table


def _damaged(where: str, what: str) -> DamagedFileError:
    return DamagedFileError(f"kernels/{INDEX}: the {what} of {where[:80]!r} are not as written.")
