"""The manifest: what an artifact holds, who wrote it, and the checksum of every member."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fpcompiler.artifact.damage import DamagedFileError
from fpcompiler.errors import ArtifactError

FORMAT: Final = "fpcompiler artifact"
FORMAT_VERSION: Final = 1
"""Version of the file format; a reader refuses a newer one."""

_PACKAGES: Final = ("fpcompiler", "torch", "numpy", "torch-mlir", "transformers")


@dataclass(frozen=True)
class Sum:
    """Checksum and size of a member."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What stands in ``manifest.json``.

    Attributes:
        fpcompiler: Version of the writer.
        scheme: Exact text of the scheme.
        pipeline: Text of the pipeline that compiled the model.
        packages: Versions of the packages that took part.
        targets: What the artifact runs on.
        members: Checksum and size of every other member.
    """

    fpcompiler: str
    scheme: str
    pipeline: str
    packages: Mapping[str, str]
    targets: tuple[str, ...]
    members: Mapping[str, Sum]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; :meth:`from_json` reads them back."""
        sums = {name: {"sha256": s.sha256, "size": s.size} for name, s in self.members.items()}
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "fpcompiler": self.fpcompiler,
            "scheme": self.scheme,
            "pipeline": self.pipeline,
            "packages": dict(self.packages),
            "targets": list(self.targets),
            "members": sums,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Return the manifest that JSON values describe.

        Raises:
            ArtifactError: If they are not a manifest of this version.
        """
        _check_version(data)
        texts = [data.get(key) for key in ("fpcompiler", "scheme", "pipeline")]
        packages, targets = data.get("packages"), data.get("targets")
        members = data.get("members")
        good = (
            {*data} == _FIELDS
            and _all_texts(texts)
            and isinstance(packages, dict)
            and _all_texts([*packages.values()])
            and isinstance(targets, list)
            and _all_texts(targets)
            and isinstance(members, dict)
        )
        if not good:
            raise DamagedFileError("manifest.json does not have the fields of a manifest.")
        sums = {name: _read_sum(name, entry) for name, entry in data["members"].items()}
        version, scheme, pipeline = (str(text) for text in texts)
        return cls(version, scheme, pipeline, data["packages"], tuple(data["targets"]), sums)


_FIELDS: Final = {
    "format", "version", "fpcompiler", "scheme", "pipeline", "packages", "targets", "members",
}  # fmt: skip


def _check_version(data: Mapping[str, Any]) -> None:
    if data.get("format") != FORMAT or type(data.get("version")) is not int:
        raise DamagedFileError("manifest.json does not say that this is an artifact of fpcompiler.")
    if data["version"] != FORMAT_VERSION:
        writer = str(data.get("fpcompiler"))[:40]
        raise ArtifactError(
            f"it has format version {data['version']} (written by fpcompiler {writer}); this "
            f"fpcompiler reads version {FORMAT_VERSION}. Upgrade fpcompiler, or compile the model "
            "again with this one."
        )


def _all_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _read_sum(name: str, entry: Any) -> Sum:
    good = isinstance(entry, dict) and {*entry} == {"sha256", "size"}
    if not good or not isinstance(entry["sha256"], str) or type(entry["size"]) is not int:
        raise DamagedFileError(f"manifest.json has no checksum and size for {name[:80]!r}.")
    return Sum(entry["sha256"], entry["size"])


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that take part in a compilation."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
