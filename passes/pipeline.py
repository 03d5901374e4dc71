"""Pipelines as text: ``normalize,insert-quantize{scheme="w4a6"},cse`` and back.

A pipeline is a tuple of passes. Its text names each pass with the options that differ from their
defaults, so that the text in a dump's header runs the same passes again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import MappingProxyType
from typing import Final

from fpcompiler.errors import PassError
from fpcompiler.passes.base import Pass, pass_text
from fpcompiler.passes.cleanup import Canonicalize, Cse, SymbolDce
from fpcompiler.passes.fold_constants import FoldConstants
from fpcompiler.passes.fuse_epilogue import FuseEpilogue
from fpcompiler.passes.fuse_quantize import FuseQuantize
from fpcompiler.passes.fuse_residual import FuseResidual
from fpcompiler.passes.gptq import Gptq
from fpcompiler.passes.group_heads import GroupHeads
from fpcompiler.passes.insert_quantize import InsertQuantize
from fpcompiler.passes.keep_if_slower import KeepIfSlower
from fpcompiler.passes.lower_gemm import LowerGemm
from fpcompiler.passes.mixed_formats import MixedFormats
from fpcompiler.passes.normalize import Normalize
from fpcompiler.passes.preshift import Preshift
from fpcompiler.passes.quantize_attention import QuantizeAttention
from fpcompiler.passes.quantize_cache import QuantizeCache
from fpcompiler.passes.quantize_weights import QuantizeWeights
from fpcompiler.passes.rotate import Rotate
from fpcompiler.passes.round_weights import RoundWeights
from fpcompiler.passes.search_formats import SearchFormats
from fpcompiler.passes.share_scales import ShareScales
from fpcompiler.passes.smooth import Smooth
from fpcompiler.passes.static_inputs import StaticInputs
from fpcompiler.passes.stored_weights import StoredWeights

Pipeline = tuple[Pass, ...]

_CLASSES: Final[tuple[type[Pass], ...]] = (
    Normalize,
    FoldConstants,
    KeepIfSlower,
    InsertQuantize,
    MixedFormats,
    ShareScales,
    Smooth,
    Rotate,
    RoundWeights,
    Preshift,
    SearchFormats,
    Gptq,
    QuantizeCache,
    QuantizeAttention,
    StaticInputs,
    StoredWeights,
    QuantizeWeights,
    LowerGemm,
    GroupHeads,
    FuseQuantize,
    FuseEpilogue,
    FuseResidual,
    Cse,
    Canonicalize,
    SymbolDce,
)

PASSES: Final[Mapping[str, type[Pass]]] = MappingProxyType({c.name: c for c in _CLASSES})
"""Every pass by the name it has in a pipeline text."""

_TOKEN: Final = re.compile(r'\s*(?:([\w.+-]+)|"((?:[^"\\]|\\.)*)"|([{},=]))')


def pipeline_text(pipeline: Sequence[Pass]) -> str:
    """Return the text that :func:`parse_pipeline` turns back into an equal pipeline."""
    return ",".join(pass_text(item) for item in pipeline)


def parse_pipeline(text: str, passes: Mapping[str, type[Pass]] = PASSES) -> Pipeline:
    """Return the pipeline that a text describes.

    Args:
        text: Names separated by commas; options in braces, separated by spaces: ``a,b{x=1 y="z"}``.
        passes: The passes it may name, by default all of ours; add your own here.

    Raises:
        PassError: If the text is malformed, or names an unknown pass, option or value.
    """
    parser = _Parser(text, passes)
    return parser.pipeline()


class _Parser:
    def __init__(self, text: str, passes: Mapping[str, type[Pass]]) -> None:
        self.text = text
        self.passes = passes
        self.tokens = _tokens(text)
        self.position = 0

    def pipeline(self) -> Pipeline:
        if self._peek() is None:
            return ()
        result = [self._pass()]
        while self._peek() is not None:
            self._expect(",")
            result.append(self._pass())
        return tuple(result)

    def _peek(self) -> str | None:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else None

    def _next(self) -> tuple[str, bool]:
        if self.position >= len(self.tokens):
            raise PassError(f"the pipeline {self.text!r} ends too early")
        token = self.tokens[self.position]
        self.position += 1
        return token

    def _expect(self, symbol: str) -> None:
        token, is_symbol = self._next()
        if token != symbol or not is_symbol:
            raise PassError(f"the pipeline {self.text!r} has {token!r} where {symbol!r} should be")

    def _pass(self) -> Pass:
        name, _ = self._next()
        if name not in self.passes:
            near = difflib.get_close_matches(name, list(self.passes), n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise PassError(f"There is no pass {name!r}. {hint}Passes: {', '.join(self.passes)}.")
        options = self._options() if self._peek() == "{" else {}
        return _create(self.passes[name], options)

    def _options(self) -> dict[str, str]:
        self._expect("{")
        options: dict[str, str] = {}
        while self._peek() != "}":
            key, _ = self._next()
            self._expect("=")
            if key in options:
                raise PassError(f"the pipeline {self.text!r} gives the option {key!r} twice")
            options[key] = self._next()[0]
        self._expect("}")
        return options


def _tokens(text: str) -> list[tuple[str, bool]]:
    """Return the tokens, each with whether it is a symbol; quoted text is never one."""
    tokens: list[tuple[str, bool]] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if not match:
            raise PassError(f"the pipeline {text!r} cannot be read at {text[position:]!r}")
        word, quoted, symbol = match.groups()
        if quoted is not None:
            tokens.append((re.sub(r"\\(.)", r"\1", quoted), False))
        else:
            tokens.append((word or symbol, symbol is not None))
        position = match.end()
    return tokens


def _create(kind: type[Pass], options: Mapping[str, str]) -> Pass:
    known = {f.name: f for f in fields(kind)}
    for key in options:
        if key not in known:
            names = ", ".join(known) or "none"
            raise PassError(f"{kind.name} has no option {key!r}; its options: {names}.")
    return kind(**{key: _convert(kind, known[key], value) for key, value in options.items()})


def _convert(kind: type[Pass], option: Field[object], text: str) -> object:
    """Turn the text of an option into the type of its default."""
    default = option.default
    if default is MISSING or isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise PassError(f"{kind.name}: {option.name} must be true or false, not {text!r}")
        return text == "true"
    try:
        return type(default)(text)  # type: ignore[call-arg]
    except ValueError:
        expected = type(default).__name__
        raise PassError(f"{kind.name}: {option.name} must be {expected}, not {text!r}") from None
