"""The benchmark of the DiT: compiled here, evaluated where there is no compiler, and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("torch_mlir")

from examples.benchmarks import dit
from examples.dit.diffusion import sampling_timesteps
from examples.dit.pictures import BLACK, GAP, SCALE, WHITE, draw

ROOT = Path(__file__).parents[2]
ROWS = ("fp4dit-w4a6:rtn", "w4a4:rtn")


def options(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dit.py", *map(str, words)])
    dit.main()


def test_rows_are_compiled_and_evaluated_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--artifacts", tmp_path / "artifacts", "--steps", 2)
    shared += ("--threads", torch.get_num_threads())
    options(monkeypatch, "compile", *shared, "--rows", *ROWS, "--pictures", 1, "--calls", 2)
    out = tmp_path / "dit.json"
    code = f"import sys; sys.modules['torch_mlir'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from examples.benchmarks import dit; dit.main()"
    words = ("evaluate", *shared, "--samples", 3, "--batch", 2, "--out", out)
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "frechet_to_real" in done.stdout
    report = json.loads(out.read_text())
    found = {f"{row['scheme']}:{row['method']}": row for row in report["rows"]}
    assert list(found) == list(ROWS)
    assert all(row["quantized_layers"] == 24 for row in found.values())
    noise = [row["metrics"]["psnr_db"] for row in found.values()]
    assert 40 > noise[0] > noise[1] > 10
    assert report["fp32"]["metrics"].keys() == {"class_accuracy"}

    # Rows are added to those that were measured in the same way only.
    row = report["rows"].pop()
    out.write_text(json.dumps(report))
    again = ("evaluate", *shared, "--samples", 3, "--out", out, "--rows", ROWS[1], "--add")
    with pytest.raises(SystemExit, match="--add needs the same options"):
        options(monkeypatch, *again)
    options(monkeypatch, *again, "--batch", 2)
    added = json.loads(out.read_text())["rows"]
    assert added[0] == report["rows"][0]
    assert added[1]["metrics"] == row["metrics"]

    options(monkeypatch, "picture", tmp_path / "samples.png", *shared, "--rows", ROWS[1])
    with Image.open(tmp_path / "samples.png") as image:
        assert image.height == GAP + 13 + GAP + 2 * (28 * SCALE + GAP)
    with pytest.raises(SystemExit, match=r"run: dit\.py compile --rows nvfp4:rtn"):
        options(monkeypatch, "evaluate", *shared, "--out", out, "--rows", "nvfp4:rtn")
    capsys.readouterr()


def test_calibration_has_each_timestep_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["dit.py", "compile", "--steps", "3", "--calls", "6", "--pictures", "2"]
    monkeypatch.setattr(sys, "argv", words)
    calls = dit.calibration(dit.arguments())
    assert [int(t.unique()) for _, t, _ in calls] == sampling_timesteps(3) * 2
    assert all(y.tolist() == [0, 1, 10, 10] for _, _, y in calls)


def test_a_grid_of_pictures(tmp_path: Path) -> None:
    rows = {"white": torch.full((2, 1, 4, 4), -1.0), "some label": torch.ones(2, 1, 4, 4)}
    rows["some label"][1, 0, 3, 3] = -7.0
    draw(tmp_path / "new" / "grid.png", rows, ["a", "b"])
    with Image.open(tmp_path / "new" / "grid.png") as image:
        right = image.width - GAP, image.height - GAP
        pixels = [image.getpixel((right[0] - x, right[1] - y)) for x, y in ((1, 1), (3, 1), (1, 3))]
        assert pixels == [WHITE, BLACK, BLACK]
        left = image.crop((0, 0, image.width - 3 * (4 * SCALE + GAP), image.height))
        assert left.getextrema()[0] < 128
