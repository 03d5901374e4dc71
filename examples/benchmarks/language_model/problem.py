"""What is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A prompt, and tokens that are generated after it.

    Attributes:
        prompt: Tokens of the prompt.
        tokens: Tokens that are generated.
        threads: Threads of the runtime.
        scheme: What the model is compiled to.
    """

    prompt: int
    tokens: int
    threads: int
    scheme: str

    @property
    def positions(self) -> int:
        """Positions that the cache holds."""
        return self.prompt + self.tokens
