"""What was checked of one kernel, and what came out: the record that travels with it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fpcompiler.codegen.proof.disassembly import MachineCode
from fpcompiler.codegen.proof.launch import LaunchRecord

__all__ = ["Check", "Outcome", "ProofRecord"]


class Outcome(enum.Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        level: ``L0`` to ``L5``.
        name: What.
        outcome: How it ended. It passes if nothing was found and every control was noticed.
        detail: What was compared, or why it was skipped.
        findings: What is not as it must be.
        controls: Whether the same check noticed what is wrong on purpose, by what that is.
        measured: Numbers that came with it.
    """

    level: str
    name: str
    outcome: Outcome
    detail: str
    findings: tuple[str, ...] = ()
    controls: Mapping[str, bool] = field(default_factory=dict, hash=False)
    measured: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(
        cls,
        level: str,
        name: str,
        detail: str,
        findings: Iterable[str] = (),
        controls: Mapping[str, bool] = MappingProxyType({}),
        measured: Mapping[str, float] = MappingProxyType({}),
    ) -> Check:
        """Return a check that was carried out."""
        found = tuple(findings)
        good = not found and all(controls.values())
        outcome = Outcome.PASSED if good else Outcome.FAILED
        seen, numbers = MappingProxyType(dict(controls)), MappingProxyType(dict(measured))
        return cls(level, name, outcome, detail, found, seen, numbers)

    @classmethod
    def skipped(cls, level: str, name: str, reason: str) -> Check:
        """Return a check that could not be carried out here, or says nothing of the kernel."""
        return cls(level, name, Outcome.SKIPPED, reason)

    @property
    def unnoticed(self) -> tuple[str, ...]:
        """The controls that the check took for right."""
        return tuple(name for name, noticed in self.controls.items() if not noticed)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "level": self.level,
            "name": self.name,
            "outcome": self.outcome.value,
            "detail": self.detail,
            "findings": list(self.findings),
            "controls": dict(self.controls),
            "measured": dict(self.measured),
        }


@dataclass(frozen=True)
class ProofRecord:
    """The checks of one kernel.

    Attributes:
        kernel: Its name.
        arch: Its architecture.
        description: The instance that it was generated from, as JSON values.
        sha256: Checksum of its library.
        toolchain: What compiled it.
        checks: What was checked.
        launches: What calls of it asked of a GPU.
        machine_code: What its machine code is, where there was a disassembler.
    """

    kernel: str
    arch: str
    description: Mapping[str, Any] = field(hash=False)
    sha256: str
    toolchain: str
    checks: tuple[Check, ...]
    launches: tuple[LaunchRecord, ...] = ()
    machine_code: MachineCode | None = None

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing failed."""
        outcomes = {check.outcome for check in self.checks}
        return Outcome.PASSED in outcomes and Outcome.FAILED not in outcomes

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        code = self.machine_code
        return {
            "kernel": self.kernel,
            "arch": self.arch,
            "description": dict(self.description),
            "sha256": self.sha256,
            "toolchain": self.toolchain,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "launches": [launch.to_json() for launch in self.launches],
            "machine_code": code and code.to_json(),
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the rows of a table: level, check, outcome, controls, and what was found."""
        return [
            (check.level, check.name, check.outcome.value, _controls(check), _found(check))
            for check in self.checks
        ]


def _controls(check: Check) -> str:
    noticed = len(check.controls) - len(check.unnoticed)
    return f"{noticed} of {len(check.controls)} red" if check.controls else ""


def _found(check: Check) -> str:
    green = (f"not noticed: {name}" for name in check.unnoticed)
    return "; ".join((*check.findings, *green)) or check.detail
