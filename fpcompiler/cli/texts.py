"""Text files and tokenizers: where ``fpcompiler eval`` gets words from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpcompiler.errors import DependencyError, OptionError

__all__ = ["read_text", "read_lines", "read_tokenizer", "without_limits", "token_id"]


def read_text(file: str) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        OptionError: If there is no such file, or it is not UTF-8.
    """
    if not Path(file).is_file():
        raise OptionError(f"there is no file {file}.")
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is not a text in UTF-8: {error}") from error


def read_lines(file: str, limit: int | None = None) -> list[tuple[str, str]]:
    """Return the first lines of a file that are not empty, each after the words that name it.

    Raises:
        OptionError: If there is no such file, or it is not UTF-8.
    """
    lines = enumerate(read_text(file).split("\n"), 1)
    return [(f"{file}, line {number}", line) for number, line in lines if line.strip()][:limit]


def read_tokenizer(file: str) -> Any:
    """Return the tokenizer of a ``tokenizer.json``.

    Raises:
        OptionError: If the file is missing or is something else.
        DependencyError: If the package tokenizers is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DependencyError(
            "--tokenizer needs the package tokenizers: pip install 'fpcompiler[models]'. Without "
            "it, perplexity runs on --tokens."
        ) from error
    text = read_text(file)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # The package raises nothing more precise.
        raise OptionError(f"{file} is no tokenizer.json of Hugging Face: {error}") from error


def without_limits(tokenizer: Any) -> Any:
    """Return the tokenizer, which then neither cuts nor pads as its file may say."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def token_id(tokenizer: Any, token: str) -> int:
    """Return the id of a token, which without a tokenizer (None) is written as a number.

    Raises:
        OptionError: If there is no such token.
    """
    if tokenizer is None:
        if not token.isdecimal():
            raise OptionError(f"without --tokenizer a token is a number, not {token!r}.")
        return int(token)
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise OptionError(f"the tokenizer has no token {token!r}.")
    return found
