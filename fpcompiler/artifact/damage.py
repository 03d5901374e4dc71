"""The error for a file that is no whole, unchanged artifact."""

from __future__ import annotations

from fpcompiler.errors import ArtifactError


class DamagedFileError(ArtifactError):
    """A file whose bytes are not those that were saved. What to do is the same for all causes."""

    def __init__(self, cause: str) -> None:
        """Say the cause, and then what to do."""
        super().__init__(f"{cause} Copy it again from its source, or compile the model again.")
