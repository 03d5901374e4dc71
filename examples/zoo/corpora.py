"""Real texts, photographs and speech: what the metrics of the zoo are measured on."""

from __future__ import annotations

import bz2
import html
import re
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from examples.zoo import packages
from fpcompiler.errors import DependencyError

LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")
"""Where the Debian package pocketsphinx-testdata puts its clips."""

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

_MARKUP = (
    r"<!--.*?-->",
    r"<ref[^>/]*/>",
    r"<ref.*?</ref>",
    r"(?i)<(math|gallery|timeline|code|source)[^>]*>.*?</\1>",
    r"\{\|.*?\n\|\}",
)
_MEDIA = r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"
_TAIL = r"\n==+ *(?:See also|References|External links|Notes|Further reading|Bibliography)"


def wikipedia() -> Iterator[str]:
    """Yield the text of 96 English Wikipedia articles, without markup, tables and references."""
    with bz2.open(packages.WIKIPEDIA.path(), "rt", encoding="utf8") as file:
        dump = file.read()
    for page in re.finditer(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        title, body = page.groups()
        if ":" in title or body.lstrip().lower().startswith("#redirect"):
            continue
        article = _plain_text(html.unescape(body))
        if len(article) > 500:
            yield article


def _plain_text(source: str) -> str:
    for pattern in _MARKUP:
        source = re.sub(pattern, "", source, flags=re.DOTALL)
    # Templates and links nest: take the innermost ones out, some times over.
    for _ in range(8):
        source = re.sub(r"\{\{[^{}]*\}\}", "", source)
    for _ in range(3):
        source = re.sub(_MEDIA, "", source)
    source = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", source)
    source = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", source)
    source = re.sub(r"'{2,}|<[^>]+>", "", source)
    body = re.split(_TAIL, source)[0]
    lines = [line.strip() for line in body.split("\n")]
    lines = [line for line in lines if line and line[0] not in "|!{}*#:;"]
    text = "\n\n".join(re.sub(r"^=+ *(.*?) *=+$", r"\1", line) for line in lines)
    return html.unescape(text).replace("\xa0", " ")


def lee() -> tuple[list[str], Tensor]:
    """Return 50 short news texts and the human similarity of each pair [50, 50], from 0 to 1.

    Lee, Pincombe, Welsh, "An Empirical Evaluation of Models of Text Document Similarity", 2005.
    """
    lines = packages.LEE_TEXTS.path().read_text(encoding="latin-1").splitlines()
    ratings = np.loadtxt(packages.LEE_RATINGS.path(), delimiter="\t")
    return [line.strip() for line in lines if line.strip()], torch.from_numpy(ratings)


def lee_background() -> list[str]:
    """Return 299 news texts of the time of :func:`lee`, none of which is among those 50."""
    lines = packages.LEE_BACKGROUND.path().read_text(encoding="latin-1").splitlines()
    return [line.strip() for line in lines if line.strip()]


def photographs(size: int = 224) -> Tensor:
    """Return eight photographs as normalized RGB [8, 3, size, size], cut to the middle square.

    Raises:
        DependencyError: If scikit-image is missing.
    """
    return torch.stack([_photograph(file.path(), size) for file in packages.PHOTOGRAPHS])


def more_pictures(size: int = 224) -> Tensor:
    """Return eight other pictures in the same form: textures, cells, the moon, stars, a page.

    Raises:
        DependencyError: If scikit-image is missing.
    """
    return torch.stack([_photograph(file.path(), size) for file in packages.MORE_PICTURES])


def _photograph(path: Path, size: int) -> Tensor:
    with Image.open(path) as file:
        image = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean = torch.tensor(_IMAGENET_MEAN).view(3, 1, 1)
    deviation = torch.tensor(_IMAGENET_DEVIATION).view(3, 1, 1)
    return (pixels - mean) / deviation


def librivox(folder: Path = LIBRIVOX) -> list[tuple[Tensor, str]]:
    """Return five clips of a read novel: sound [samples] at 16 kHz from -1 to 1, and the words.

    Raises:
        DependencyError: If the Debian package with the clips is missing.
    """
    transcription = folder / "transcription"
    if not transcription.is_file():
        raise DependencyError(
            f"there are no speech clips in {folder}. Run: apt-get install pocketsphinx-testdata"
        )
    lines = re.findall(r"<s> (.*?) </s> \((.*?)\)", transcription.read_text())
    return [(_sound(folder / f"{name}.wav"), words) for words, name in lines]


def spoken_cards(folder: Path) -> list[Tensor]:
    """Return five clips in which cards of a game are named: sound [samples] at 16 kHz.

    Raises:
        DependencyError: If the Debian package with the clips is missing.
    """
    files = sorted(folder.glob("*.wav"))
    if not files:
        raise DependencyError(
            f"there are no speech clips in {folder}. Run: apt-get install pocketsphinx-testdata"
        )
    return [_sound(file) for file in files]


def _sound(path: Path) -> Tensor:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        data = file.readframes(file.getnframes())
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
