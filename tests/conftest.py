"""What all tests share: which ones run, golden files, and programs captured once."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from fpcompiler.capture import CapturedProgram

Golden = Callable[[str, str], None]
"""Compares a text with the golden file of a name."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--update-golden", action="store_true", help="write golden files anew")
    bundle = "kernels and models for a GPU, see tests/runtime/cuda/gpu_bundle.py"
    parser.addoption("--gpu-bundle", default=".gpu", help=bundle)


def _without_nvcc() -> str:
    if importlib.util.find_spec("cutlass_library") is None:
        return "nvidia-cutlass is not installed"
    return "" if shutil.which("nvcc") else "there is no nvcc"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": "" if config.getoption("--slow") else "slow: run with --slow",
        "gpu": "" if torch.cuda.is_available() else "there is no CUDA device",
        "nvcc": _without_nvcc(),
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Return a function that compares a text with ``tests/golden/<test file>/<name>``."""
    folder = Path(__file__).parent / "golden" / request.path.stem
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        file = folder / name
        if update:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"there is no {file}: run pytest --update-golden, and read it"
        assert text == file.read_text(encoding="utf-8"), f"{file} differs (--update-golden)"

    return compare


@pytest.fixture(scope="session")
def captured() -> Callable[[str], CapturedProgram]:
    """Return a function that gives the captured program of a case of ``tests.models``."""
    from fpcompiler.capture import capture
    from tests.models import cases

    @functools.cache
    def of_case(name: str) -> CapturedProgram:
        model, args, kwargs = cases()[name].make()
        return capture(model, args, kwargs)

    return of_case
