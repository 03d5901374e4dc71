"""CUTLASS's host reference, compiled once for all tests of a session."""

from __future__ import annotations

import pytest

from fpcompiler.codegen.proof.host_reference import HostReference, host_reference, why_missing


@pytest.fixture(scope="session")
def reference() -> HostReference:
    reason = why_missing()
    if reason:
        pytest.skip(reason)
    return host_reference()
