"""What went wrong in torch.export, where in the user's source, and what to change."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from torch import nn
from torch._ops import OpOverload

from fpcompiler.capture.call import Call
from fpcompiler.capture.model_state import same_buffers
from fpcompiler.capture.source import (
    describe_frame,
    first_line,
    place_of_attribute,
    running_layer,
    user_frames,
)
from fpcompiler.errors import CaptureError, describe_layer


@dataclass(frozen=True)
class _Rule:
    """Text that an error contains, and what to tell the user then.

    ``about_sizes``: whether the error could go away with other or fixed sizes.
    """

    pattern: str
    problem: str
    fix: str
    about_sizes: bool = False


_RULES: Final = (
    _Rule(
        r"Found <class '[\w.]*Cache'> in output",
        "the model returns a cache of past keys and values, which is no tensor",
        "pass use_cache=False; for decoding token by token wrap the model in "
        "fpcompiler.huggingface.CachedDecoder.",
    ),
    _Rule(
        r"Found <class '(?P<what>[^']+)'> in output",
        "the model returns a {what}",
        "return tensors, or tuples, lists and dicts of tensors.",
    ),
    _Rule(
        r"guard on data-dependent expression (Eq|Ne|[^(]*[<>])",
        "control flow in Python depends on the contents of a tensor",
        "replace `if` on a tensor by torch.where(condition, a, b), which computes both sides, and "
        ".item() in conditions by tensor operations.",
    ),
    _Rule(
        r"data-dependent expression",
        "a number in Python comes from the contents of a tensor",
        "keep the number in a tensor: index with the tensor itself instead of int(t) or t.item(), "
        "use torch functions instead of those of math, and masks instead of slices and loops "
        "whose length depends on data.",
    ),
    _Rule(
        r"\.numpy\(\)|convert .* numpy|numpy.* fake|_array__",
        "the model leaves PyTorch for NumPy, where nothing can be recorded",
        "use the torch function of the same name instead of .numpy().",
    ),
    _Rule(
        r"fake tensor in the exported program constant's list|leaked|mutat\w+ .*(frozen|constant)",
        "the model changes a tensor that is neither an input nor a buffer",
        "do not use .data or change parameters in forward; keep state in a buffer "
        "(register_buffer) and change that in place.",
    ),
    _Rule(
        r"no fake impl|UnsupportedOperator|UnsupportedFakeTensor",
        "an operator says nothing about the shape of its result, so it cannot be traced",
        "replace the operator by PyTorch functions, or give it a torch.library.register_fake.",
    ),
    _Rule(
        r"Constraints violated|Specializations unexpectedly required|ConstraintViolation",
        "the model does not allow the sizes that `dynamic` lets vary",
        "leave those dimensions out of dynamic, or give them the range or relation named under "
        "'Suggested fixes' above; dynamic='auto' finds out which sizes may vary.",
        about_sizes=True,
    ),
    _Rule(
        r"dynamic_shapes|structure of `inputs`",
        "`dynamic` does not fit the example inputs",
        "give one entry per argument, nested like the argument: {'ids': {0: Dim('batch')}}.",
        about_sizes=True,
    ),
)

_UNKNOWN: Final = _Rule(
    "",
    "torch.export failed",
    "make torch.export.export(model, args, kwargs, strict=False) work under torch.no_grad(); its "
    "full traceback is above. A program exported in another way can be passed to compile() too.",
    about_sizes=True,
)

_CONSTRAINTS: Final = "the model does not allow"


def about_sizes(error: Exception) -> bool:
    """Return whether an export could work with other sizes, or with fewer that vary."""
    return _rule(error).about_sizes


def _rule(error: Exception) -> _Rule:
    text = f"{type(error).__name__}: {error}"
    return next((rule for rule in _RULES if re.search(rule.pattern, text)), _UNKNOWN)


def diagnose(error: Exception, model: nn.Module, call: Call) -> CaptureError:
    """Return the error to raise for an exception that came out of torch.export.

    The message has up to five lines: what failed and why, the user's source line, the operator,
    the original error, and what to do.
    """
    rule = _rule(error)
    if rule is _UNKNOWN and (own := _own_error(model, call)) is not None:
        return _compose(
            model,
            own,
            "the model itself fails on the example inputs, before anything is compiled",
            "call the model with these inputs until it works; compile() needs inputs that fit.",
        )
    match = re.search(rule.pattern, str(error))
    problem = rule.problem.format(**(match.groupdict() if match else {}))
    return _compose(model, error, problem, rule.fix)


def side_effect(warning: str, model: nn.Module) -> CaptureError:
    """Return the error for a model that keeps tensors in plain attributes.

    torch.export warns about it: "The tensor attribute self.a.b was assigned during export".
    """
    match = re.search(r"self\.([\w.]+)", warning)
    path, _, attribute = (match[1] if match else "").rpartition(".")
    owner = dict(model.named_modules()).get(path, model)
    place = place_of_attribute(owner, attribute)
    where = f"  at {place}\n" if place else ""
    return CaptureError(
        f"{_subject(model)}: forward keeps a tensor in self.{attribute} of {describe_layer(path)}, "
        f"and a program has no such place: the next call would not find it.\n{where}"
        f"Fix: make it a buffer, self.register_buffer({attribute!r}, ...) in __init__, and "
        "change it in place (copy_, index_copy_); or return it."
    )


def _own_error(model: nn.Module, call: Call) -> Exception | None:
    """Return the error that the model raises on the example inputs without any tracing."""
    args, kwargs = call.with_tensors([leaf.tensor.clone() for leaf in call.leaves])
    try:
        with same_buffers(model):
            model(*args, **kwargs)
    except Exception as error:  # The model's own code runs here.
        return error
    return None


def _compose(model: nn.Module, error: Exception, problem: str, fix: str) -> CaptureError:
    lines = [f"{_subject(model)}: {problem}."]
    frames = user_frames(error.__traceback__)
    if frames:
        lines.append(f"  at {describe_frame(*frames[-1])}")
        lines.append(f"  in {running_layer(model, frames)}")
    operator = _operator(error.__traceback__)
    if operator:
        lines.append(f"  operator: {operator}")
    said = _constraints(error) if _CONSTRAINTS in problem else first_line(error)
    lines.append(f"  torch says: {said}")
    return CaptureError("\n".join([*lines, f"Fix: {fix}"]))


def _subject(model: nn.Module) -> str:
    return f"{type(model).__name__} cannot be captured"


def _constraints(error: Exception) -> str:
    """Return the lines of a constraint error that name sizes."""
    text = str(error).strip().partition("\n\nThe error above")[0]
    return re.sub(r" For more information, run with TORCH_LOGS\S*", "", text).replace(
        "\n", "\n    "
    )


def _operator(trace: TracebackType | None) -> str:
    """Return the innermost operator that was being traced; torch's frames hold it as ``func``."""
    found = ""
    for frame, _ in traceback.walk_tb(trace):
        function = frame.f_locals.get("func")
        found = str(function) if isinstance(function, OpOverload) else found
    return found
