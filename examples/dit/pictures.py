"""Pictures of pictures: a grid with labels, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 2
"""Pixels of the grid for each pixel of a picture, along a side."""
GAP = 6
TEXT = 13
BLACK, WHITE = 0, 255


def draw(path: Path, rows: Mapping[str, Tensor], columns: Sequence[str]) -> None:
    """Write pictures in rows, each row and each column with its label.

    Args:
        path: The PNG.
        rows: For each label the pictures of the row, ``[columns, 1, H, W]`` in -1 to 1.
        columns: A label for each column.
    """
    font = ImageFont.load_default(TEXT)
    side = SCALE * next(iter(rows.values())).shape[-1]
    left = GAP + max(round(font.getlength(label)) for label in rows) + GAP
    top = GAP + TEXT + GAP
    size = left + len(columns) * (side + GAP), top + len(rows) * (side + GAP)
    canvas = Image.new("L", size, WHITE)
    pen = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        middle = left + column * (side + GAP) + side // 2
        pen.text((middle, top // 2), label, BLACK, font, anchor="mm")
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (side + GAP)
        pen.text((left - GAP, y + side // 2), label, BLACK, font, anchor="rm")
        for column in range(len(columns)):
            canvas.paste(_image(pictures[column, 0], side), (left + column * (side + GAP), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _image(picture: Tensor, side: int) -> Image.Image:
    """Return one picture ``[H, W]``; as the photographs in catalogues, dark on white."""
    levels = ((1 - picture.clamp(-1, 1)) * 127.5).round().byte().cpu().numpy()
    return Image.fromarray(levels).resize((side, side), Image.Resampling.NEAREST)
