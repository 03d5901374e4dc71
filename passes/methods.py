"""The pipelines of :func:`fpcompiler.compile`: what is the same for all, and methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from fpcompiler.errors import PassError
from fpcompiler.passes.attention_option import attention_passes
from fpcompiler.passes.base import Pass
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
from fpcompiler.passes.pipeline import Pipeline
from fpcompiler.passes.preshift import Preshift
from fpcompiler.passes.quantize_weights import QuantizeWeights
from fpcompiler.passes.rotate import Rotate
from fpcompiler.passes.round_weights import RoundWeights
from fpcompiler.passes.search_formats import SearchFormats
from fpcompiler.passes.share_scales import ShareScales
from fpcompiler.passes.smooth import Smooth
from fpcompiler.passes.static_inputs import StaticInputs
from fpcompiler.passes.stored_weights import StoredWeights


@dataclass(frozen=True)
class Method:
    """How formats, scales and roundings are found.

    Attributes:
        passes: What runs between ``insert-quantize`` and ``quantize-weights``.
        description: What it does, in a line.
        needs_data: Whether it learns from calibration data.
    """

    passes: tuple[Pass, ...]
    description: str
    needs_data: bool = True

    @property
    def least_batches(self) -> int:
        """How many batches of calibration data it needs."""
        learned = (item for item in self.passes if isinstance(item, RoundWeights))
        return 2 if any(item.unit == "block" for item in learned) else int(self.needs_data)


_PRESHIFT: Final = Preshift(rho="search", limit=15)
_SEARCH_PRESHIFT: Final = (
    SearchFormats(inputs="keep"),
    replace(_PRESHIFT, formats="same-bits"),
)

METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "rtn": Method((), "round to nearest", needs_data=False),
        "mse": Method(
            (QuantizeWeights(clip="mse"),),
            "rtn, rows of weights clipped where their squared error is least",
            needs_data=False,
        ),
        "smooth": Method((Smooth(),), "outliers of inputs moved into weights (SmoothQuant)"),
        "rotate": Method(
            (Rotate(),), "Hadamard transforms of quantized inputs, then rtn", needs_data=False
        ),
        "preshift": Method((_PRESHIFT,), "inputs times 2**k, weights by 2**-k, in wider codes"),
        "preshift-gptq": Method((_PRESHIFT, Gptq()), "preshift, then gptq"),
        "search-preshift": Method(
            _SEARCH_PRESHIFT,
            "formats and scales of weights searched, then inputs shifted in the best format",
        ),
        "search-preshift-gptq": Method((*_SEARCH_PRESHIFT, Gptq()), "search-preshift, then gptq"),
        "search": Method((SearchFormats(),), "formats and scales by the error of the output"),
        "search-fisher": Method(
            (SearchFormats(objective="fisher"),),
            "search, errors weighted by what they do to the model's output",
        ),
        "faithful": Method(
            (SearchFormats(mode="faithful"),), "the search as LLM-FP4 published it, to compare with"
        ),
        "gptq": Method((Gptq(),), "each rounding makes up for those before (GPTQ)"),
        "search-gptq": Method((SearchFormats(), Gptq()), "search, then gptq with its scales"),
        "adaround": Method(
            (RoundWeights(),), "roundings learned by the outputs of blocks (AdaRound-FP, FP4DiT)"
        ),
        "adaround-layers": Method(
            (RoundWeights(unit="layer"),), "roundings learned by the outputs of single layers: fast"
        ),
        "search-adaround": Method(
            (SearchFormats(), RoundWeights()), "search, then adaround with its scales"
        ),
        "search-adaround-layers": Method(
            (SearchFormats(), RoundWeights(unit="layer")),
            "search, then adaround-layers with its scales",
        ),
        "rotate-gptq": Method(
            (Rotate(weights_too=True), Gptq()), "rotate inputs of all layers, then gptq"
        ),
    }
)
"""The methods by name."""


def default_pipeline(
    scheme: str,
    target: str = "reference",
    clip: str = "max",
    method: str = "rtn",
    attention: str | None = None,
    effective_bits: float | None = None,
    round_budget: str = "",
    *,
    share_scales: bool = False,
    static_inputs: bool = False,
    keep_on: str = "",
) -> Pipeline:
    """Return the passes that :func:`fpcompiler.compile` runs.

    Args:
        scheme: The exact text of a scheme.
        target: Name of the target.
        clip: How row scales of weights are chosen, see ``quantize-weights``.
        method: A name in :data:`METHODS`.
        attention: What of attention is quantized, see :func:`attention_passes`; None: nothing.
        effective_bits: Bits for each weight, scales included, within which layers get weights of
            different widths, see ``mixed-formats``; None: those of the scheme.
        round_budget: About what learning roundings may take, such as ``5min``; empty: no limit.
        share_scales: Whether weights that share an input get one scale of the tensor, see
            ``share-scales``.
        static_inputs: Whether inputs get a scale of the tensor from calibration data, see
            ``static-inputs``.
        keep_on: GPUs, with commas: layers that would be slower there are kept, see
            ``keep-if-slower``; empty: none are.

    Raises:
        PassError: If there is no such method, it finds scales of its own for each weight though
            they shall share them, no weights take so few or so many bits, or the budget is no
            length of time, or for a method that learns no roundings.
        FormatError: If an operand for attention means nothing.
        OptionError: If the text for attention cannot be read.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, list(METHODS), n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise PassError(f"There is no method {method!r}. {hint}Methods: {', '.join(METHODS)}.")
    if effective_bits is not None and "preshift" in method:
        raise PassError(
            f"{method} stores shifted weights in wider formats, so that effective_bits would not "
            "hold. Take another method, such as search or rotate-gptq."
        )
    if share_scales and any(not isinstance(item, _KEEP_SCALES) for item in METHODS[method].passes):
        fitting = [
            name
            for name, row in METHODS.items()
            if all(isinstance(item, _KEEP_SCALES) for item in row.passes)
        ]
        raise PassError(
            f"share_scales gives weights scales of its own, and {method} searches them or changes "
            f"the weights before. Methods that go with it: {', '.join(fitting)}."
        )
    return (
        *_inserted(scheme, keep_on),
        *(() if effective_bits is None else (MixedFormats(effective_bits, target=target),)),
        *((ShareScales(),) if share_scales else ()),
        *_passes(method, target, round_budget, attention),
        *((StaticInputs(),) if static_inputs else ()),
        QuantizeWeights(clip=clip),
        *_lowered(target),
    )


def import_pipeline(scheme: str, target: str) -> Pipeline:
    """Return the passes for a model whose weights a checkpoint has as codes.

    Args:
        scheme: The exact text of a scheme: what the checkpoint's layers are quantized to.
        target: Name of the target.
    """
    return (*_inserted(scheme), StoredWeights(), *_lowered(target))


def _inserted(scheme: str, keep_on: str = "") -> Pipeline:
    kept = (KeepIfSlower(scheme, keep_on),) if keep_on else ()
    return Cse(), Normalize(), FoldConstants(), *kept, InsertQuantize(scheme=scheme), Cse()


def _lowered(target: str) -> Pipeline:
    return (
        LowerGemm(target=target),
        Canonicalize(),
        GroupHeads(),
        FuseQuantize(),
        FuseEpilogue(),
        FuseResidual(),
        SymbolDce(),
    )


_KEEP_SCALES: Final = (QuantizeWeights, Gptq, RoundWeights)
"""Passes of methods that take the scales that they find."""


def what_learns(
    method: str, effective_bits: float | None = None, static_inputs: bool = False
) -> str:
    """Return what of the choices for :func:`default_pipeline` needs calibration data; or nothing.

    Args:
        method: A name in :data:`METHODS`, or any other, which :func:`default_pipeline` refuses.
        effective_bits: See there.
        static_inputs: See there.
    """
    if method in METHODS and METHODS[method].needs_data:
        return f"the method {method}"
    if static_inputs:
        return "the search for static scales of inputs"
    return "" if effective_bits is None else "the choice of widths for effective_bits"


def _passes(method: str, target: str, round_budget: str, attention: str | None) -> Iterator[Pass]:
    """Yield the passes of a method with the options that a user has chosen.

    Attention is quantized after what looks through it, and before roundings are learned with it.
    """
    waiting = () if attention is None else attention_passes(attention)
    every = METHODS[method].passes
    if round_budget and not any(isinstance(item, RoundWeights) for item in every):
        learning = [name for name in METHODS if "adaround" in name]
        raise PassError(
            f"round_budget={round_budget!r} is for methods that learn roundings, not for {method}: "
            f"{', '.join(learning)}."
        )
    for item in every:
        if isinstance(item, SearchFormats | Preshift):
            yield replace(item, target=target)
        elif isinstance(item, RoundWeights):
            yield from waiting
            waiting = ()
            yield replace(item, budget=round_budget)
        else:
            yield item
    yield from waiting
