"""What passes could not do for a model, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fpcompiler.operand import Granularity
from fpcompiler.passes.insert_quantize import InsertQuantize
from fpcompiler.passes.keep_if_slower import KEPT as SLOWER
from fpcompiler.passes.keep_if_slower import KeepIfSlower
from fpcompiler.passes.manager import PassResult
from fpcompiler.passes.methods import METHODS
from fpcompiler.scheme import Scheme


@dataclass(frozen=True)
class _Effect:
    """How to see that a pass has changed numbers.

    Attributes:
        counted: How the name of the statistic begins.
        instead: What to do where it is missing.
    """

    counted: str
    instead: str


_EFFECTS: Final[Mapping[str, _Effect]] = MappingProxyType(
    {
        "smooth": _Effect(
            "groups of layers smoothed",
            "It is for quantized inputs with large channels; for weights take gptq or rotate-gptq.",
        ),
        "rotate": _Effect(
            "groups of layers rotated",
            "It is for quantized inputs of 16 channels or more; for weights take rotate-gptq.",
        ),
        "preshift": _Effect(
            "inputs shifted",
            "It is for inputs with one scale for a tensor or token, such as "
            "a=f4E2M1FN@tensor:f32; else take rotate-gptq.",
        ),
        "search-formats": _Effect(
            "groups better than round to nearest",
            "There was nothing better to choose; take gptq or rotate-gptq.",
        ),
        "round-weights": _Effect(
            "roundings learned",
            "Give more calibration data, or more time: what was learned did not help on data that "
            "it had not seen.",
        ),
        "gptq": _Effect(
            "weights rounded by gptq",
            "Give more calibration data: with this much it rounds to nearest.",
        ),
    }
)


def advice(method: str, scheme: Scheme, results: Sequence[PassResult]) -> list[str]:
    """Return what a user of a method should know about what it did: nothing, if all is well.

    Args:
        method: A name in :data:`fpcompiler.passes.METHODS`.
        scheme: What was asked for.
        results: What the passes did.
    """
    names = {item.name for item in METHODS[method].passes}
    lines = []
    for result in results:
        name = result.text.partition("{")[0]
        # The published search may be worse than rounding to nearest, and is wanted all the same.
        if name in names and name in _EFFECTS and method != "faithful":
            lines += _idle(method, name, result.statistics)
    if method == "faithful" and not _has_rows(scheme):
        lines.append(
            "The method faithful is the same as search here: the published search is for weights "
            "with one scale for each row, such as w=f4E2M1FN@row:f32, and the scheme has none."
        )
    return lines


def all_kept(results: Sequence[PassResult]) -> str:
    """Return what a user should know if layers were kept for their speed and none is quantized.

    Args:
        results: What the passes did.

    Returns:
        An empty text if some layers are quantized, or none was kept for that.
    """
    counts = {result.name: result.statistics for result in results}
    kept = counts.get(KeepIfSlower.name, {}).get(SLOWER, 0)
    if not kept or counts.get(InsertQuantize.name, {}).get("layers quantized", 0):
        return ""
    return (
        f"keep_if_slower: no layer was quantized. {kept} that the scheme names are predicted to be "
        "slower quantized than in bf16, for the tokens of the example call; they stay as they are, "
        "and there is nothing to compile kernels for. keep_if_slower=False (--no-keep-if-slower) "
        "quantizes them, which saves memory. If the model will get larger calls, give one as the "
        "example; of the schemes, those with -row are the fastest."
    )


def _idle(method: str, name: str, statistics: Mapping[str, int]) -> list[str]:
    effect = _EFFECTS[name]
    if any(what.startswith(effect.counted) for what in statistics):
        return []
    reasons = [what for what in statistics if " left" in what or " not " in what]
    counts = ", ".join(f"{what}: {statistics[what]}" for what in reasons)
    found = f" ({counts})" if counts else ""
    return [f"The method {method}: {name} changed nothing in this model{found}. {effect.instead}"]


def _has_rows(scheme: Scheme) -> bool:
    weights = [layer.weight for layer in (scheme.base, *(rule.layer for rule in scheme.rules))]
    return any(
        weight.block is None and weight.outer.granularity is Granularity.ROW
        for weight in weights
        if weight is not None and weight.outer is not None
    )
