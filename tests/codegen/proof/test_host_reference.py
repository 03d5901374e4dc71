"""The library built from CUTLASS's headers: how it is built, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpcompiler.codegen.proof import host_reference as module
from fpcompiler.codegen.proof.host_reference import HostReference, Stored, host_reference
from fpcompiler.errors import DependencyError, NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.options import Options

E2M1, E3M2, E5M2 = FORMATS["f4E2M1FN"], FORMATS["f6E3M2FN"], FORMATS["f8E5M2"]
ZEROS = torch.zeros(2, 64, dtype=torch.uint8)


def test_without_cutlass_the_error_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_cutlass", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DependencyError, match=r"pip install --no-deps nvidia-cutlass==4\.2"):
        host_reference(Options(cache=tmp_path))


def test_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.why_missing() == "there is no g++"


def test_a_source_that_does_not_compile(reference, monkeypatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {}")
    monkeypatch.setattr(module, "_SOURCE", broken)
    with pytest.raises(DependencyError, match="could not compile CUTLASS"):
        host_reference(Options(cache=tmp_path))
    assert list((tmp_path / "proof").iterdir()) == []


def test_the_second_time_nothing_is_compiled(reference, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} is compiled again")

    monkeypatch.setattr(module, "_build", refuse)
    assert host_reference().cutlass_version == reference.cutlass_version == "4.2.0"


def test_products_by_hand(reference: HostReference) -> None:
    # 1.0 and 6.0 of E2M1 are codes 2 and 7; the low nibble is first.
    a = Stored(torch.tensor([[0x72, 0x00]], dtype=torch.uint8), E2M1)
    b = Stored(torch.tensor([[0x02, 0x77], [0x20, 0x00]], dtype=torch.uint8), E2M1)
    assert a.k == 4
    assert reference.gemm(a, b).tolist() == [[1.0, 6.0]]
    assert reference.gemm(a, b, alpha=2.0).tolist() == [[2.0, 12.0]]


def test_what_it_refuses(reference: HostReference) -> None:
    scale = torch.zeros(512, dtype=torch.uint8)
    four = Stored(ZEROS, E2M1)
    with pytest.raises(NumericsError, match="K 128 with scales none cannot be multiplied by K 512"):
        reference.gemm(four, Stored(torch.zeros(2, 384, dtype=torch.uint8), E3M2))
    with pytest.raises(NumericsError, match="no reference for f8E5M2 by f8E5M2 with scales none"):
        reference.gemm(Stored(ZEROS, E5M2), Stored(ZEROS, E5M2))
    with pytest.raises(NumericsError, match="2 rows of 128 have 512 scales"):
        reference.gemm(*[Stored(ZEROS, E2M1, scale[:4], "f8E8M0FNU")] * 2)
    with pytest.raises(NumericsError, match="2 rows of 128 have 1024 scales"):
        reference.gemm(*[Stored(ZEROS, E2M1, scale, "f8E4M3FN")] * 2)
    six = Stored(torch.zeros(2, 96, dtype=torch.uint8), E3M2, scale.repeat(2), "f8E4M3FN")
    with pytest.raises(NumericsError, match="by f6E3M2FN with scales f8E4M3FN"):
        reference.gemm(six, six)
    with pytest.raises(NumericsError, match="no type for f8E3M4; types: f4E2M1FN"):
        reference.encode(torch.ones(1), FORMATS["f8E3M4"])
    with pytest.raises(NumericsError, match="2 bytes do not hold 5 codes of f4E2M1FN"):
        reference.decode(ZEROS[0, :2], E2M1, 5)
    with pytest.raises(NumericsError, match="no scales for blocks of 64"):
        reference.scale_indices(64, 1, 64, weights=False)
