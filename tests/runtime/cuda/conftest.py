"""What tests on a GPU share: the folder that ``gpu_bundle.py`` wrote, and a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Return the folder with kernels and models; skips where it is not, or the GPU another one."""
    path = Path(request.config.getoption("--gpu-bundle"))
    if not (path / "decoder.fpc").is_file():
        pytest.skip(f"there are no kernels in {path}: see gpu_bundle.py")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    return path


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep kernels that are loaded out of the user's cache."""
    monkeypatch.setenv("FPC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
