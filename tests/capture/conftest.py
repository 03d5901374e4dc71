"""Programs captured once for all tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from fpcompiler.capture import CapturedProgram, capture
from tests.models import cases


@pytest.fixture(scope="session")
def captured() -> Callable[[str], CapturedProgram]:
    """Return a function that gives the captured program of a case of ``tests.models``."""

    @functools.cache
    def of_case(name: str) -> CapturedProgram:
        model, args, kwargs = cases()[name].make()
        return capture(model, args, kwargs)

    return of_case
