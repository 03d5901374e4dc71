"""Calling torch.export: with sizes that vary as far as the model allows."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fpcompiler.capture.call import Call, bind
from fpcompiler.capture.dynamic import Axis, Sizes, propose, refine
from fpcompiler.capture.failures import about_sizes, diagnose, side_effect
from fpcompiler.capture.functional import functional
from fpcompiler.capture.model_state import preserved, quiet, same_buffers, use_eval
from fpcompiler.capture.program import CapturedProgram, describe
from fpcompiler.capture.size_names import names_of_dims
from fpcompiler.capture.size_one import restrict_to_proven
from fpcompiler.capture.source import first_line
from fpcompiler.errors import CaptureError, OptionError

Dynamic: TypeAlias = Literal["auto"] | bool | Mapping[str, Any] | tuple[Any, ...] | list[Any] | None

TRIES: Final = 6
"""How often sizes are refined before all of them are fixed."""

_NO_MORE: Final = f"no set of varying sizes that the model allows was found in {TRIES} tries"

_ASSIGNED: Final = "was assigned during export"

_log = logging.getLogger(__name__)


class _Exported(NamedTuple):
    """What torch.export made.

    Attributes:
        program: The graph.
        notes: On its sizes.
        names: Of dimensions that vary.
        free: Those whose range torch.export found itself.
    """

    program: ExportedProgram
    notes: list[str]
    names: dict[Axis, str]
    free: frozenset[Axis] = frozenset()


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = "auto",
) -> CapturedProgram:
    """Capture a model as a functional graph of ``aten`` operators, in eval mode, without gradients.

    The model is the same after the call, also after an error: attributes, train/eval flags, buffers
    and their contents. The graph shares its parameters.

    Args:
        model: Any module that ``torch.export.export`` accepts. Hugging Face models are called with
            ``use_cache=False`` unless the inputs say otherwise.
        args: Positional example inputs. The values hardly matter, the shapes do.
        kwargs: Example inputs by keyword.
        dynamic: ``"auto"``: batch and sequence lengths vary where the model allows it, and the
            notes say where it does not. Lengths that are equal in the example must be equal in
            every call: give examples of different lengths where they may differ. ``None`` or
            ``False``: all sizes are fixed. Otherwise the ``dynamic_shapes`` of torch.export, for
            the arguments that are given.

    Raises:
        CaptureError: If the model cannot be exported; the message says where in its source, why,
            and what to change.
        OptionError: If ``dynamic`` is none of these.
    """
    _check_model(model)
    call = bind(model, args, kwargs or {})
    with preserved(model), torch.no_grad():
        note = use_eval(model)
        notes = [note] if note else []
        if call.constants:
            # A constant that travelled as an input would need a place in dynamic_shapes, and
            # torch.export loses track of those for arguments in **kwargs.
            model.forward = partial(model.forward, **call.constants)
        found = _export(model, call, dynamic)
        with quiet():
            exported, graph_notes = functional(found.program)
            proven = restrict_to_proven(model, call, exported, found.free)
    notes += [*found.notes, *graph_notes, *proven]
    for text in notes:
        _log.info("%s: %s", type(model).__name__, text)
    return describe(exported, call.parameters, call.fixed, notes, found.names)


def _check_model(model: object) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "The model is a TorchScript module, which torch.export cannot trace.\n"
            "Fix: pass the original nn.Module."
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"The model is a {type(model).__name__}; expected a torch.nn.Module.\n"
            "Fix: put the function into the forward of a module."
        )
    if hasattr(model, "_orig_mod"):
        raise CaptureError(
            "The model was wrapped by torch.compile.\nFix: pass the model inside, model._orig_mod."
        )


def _export(model: nn.Module, call: Call, dynamic: Dynamic) -> _Exported:
    if isinstance(dynamic, str) and dynamic != "auto":
        raise OptionError(
            f"dynamic={dynamic!r}: expected 'auto', None, or the dynamic_shapes of torch.export."
        )
    if dynamic == "auto" or dynamic is True:
        return _export_auto(model, call)
    tensors = [leaf.tensor for leaf in call.leaves]
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    shapes = _by_name(bound, dynamic) if dynamic else None
    result = _try(model, call, tensors, shapes)
    if isinstance(result, ExportedProgram):
        return _Exported(result, [], names_of_dims(bound, shapes or {}))
    raise diagnose(result, model, call) from result


def _export_auto(model: nn.Module, call: Call) -> _Exported:
    sizes, tries = propose(call.leaves), 0
    if call.extra:
        reason = f"torch.export cannot vary sizes when **kwargs holds tensors ({call.extra[0]})"
        sizes = sizes.without(sizes.groups, reason)
    while True:
        tensors = sizes.trace_tensors()
        result = _try(model, call, tensors, _shapes(model, call, sizes))
        if isinstance(result, ExportedProgram) and sizes.stretched():
            result = _failure_with_buffers(model, call, tensors, result) or result
        if isinstance(result, ExportedProgram):
            names = {axis: name for name, axes in sizes.groups.items() for axis in axes}
            free = frozenset(axis for name in sizes.free for axis in sizes.groups.get(name, ()))
            return _Exported(result, sizes.notes(), names, free)
        if not sizes.groups or not about_sizes(result):
            raise diagnose(result, model, call) from result
        tries += 1
        _log.debug("export with %s failed: %s", sizes.groups, result)
        sizes = _next(sizes, result) if tries < TRIES else sizes.without(sizes.groups, _NO_MORE)


def _failure_with_buffers(
    model: nn.Module, call: Call, tensors: Sequence[torch.Tensor], program: ExportedProgram
) -> Exception | None:
    """Return how a model that writes to its buffers fails on the tensors it was traced with.

    A buffer has a size of its own, such as a cache's batch, and torch before 2.13 does not compare
    it with what is written when it traces ``index_copy``.
    """
    operators = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    writes = any(schema is not None and schema.is_mutable for schema in operators)
    if not (writes or program.graph_signature.buffers_to_mutate):
        return None
    args, kwargs = call.with_tensors([tensor.clone() for tensor in tensors])
    try:
        with same_buffers(model), torch.random.fork_rng(), quiet():
            model(*args, **kwargs)
    except Exception as error:  # The model's own code runs here.
        return error
    return None


def _next(sizes: Sizes, error: Exception) -> Sizes:
    """Return what to try after an error: what the error asks for, else fewer varying sizes."""
    refined = refine(sizes, str(error))
    if refined is not None:
        return refined
    reason = f"with another size the export fails ({first_line(error)})"
    stretched = sizes.stretched()
    return sizes.without(stretched[:1] or sizes.groups, reason)


def _shapes(model: nn.Module, call: Call, sizes: Sizes) -> dict[str, Any] | None:
    if not sizes.groups:
        return None
    args, kwargs = _nested(call, sizes.dims())
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _try(
    model: nn.Module, call: Call, tensors: list[torch.Tensor], shapes: dict[str, Any] | None
) -> ExportedProgram | Exception:
    """Return the exported model, or the error that torch.export or the model's code raised."""
    # One tensor given for two arguments would become one input, and the other would be ignored.
    args, kwargs = call.with_tensors([tensor.detach() for tensor in tensors])
    result: ExportedProgram | Exception
    with quiet() as warned:
        try:
            result = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # The model's own code runs here: anything can come out.
            result = error
    said = [str(warning.message) for warning in warned]
    if isinstance(result, Exception):  # Some versions of torch warn, others raise.
        said.append(str(result))
    for text in said:
        if _ASSIGNED in text:
            raise side_effect(text, model)
    return result


def _nested(call: Call, entries: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example arguments with an entry of dynamic_shapes in place of each tensor."""
    values, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    remaining = iter(entries)
    swapped = [next(remaining) if isinstance(v, torch.Tensor) else None for v in values]
    nested: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(swapped, spec)
    return nested


def _by_name(bound: Mapping[str, Any], dynamic: Any) -> dict[str, Any]:
    """Return the user's dynamic_shapes with an entry for every argument, as torch.export wants."""
    if isinstance(dynamic, tuple | list):
        if len(dynamic) > len(bound):
            raise CaptureError(
                f"dynamic has {len(dynamic)} entries for {len(bound)} example inputs.\n"
                f"Fix: give one entry for each of {', '.join(bound)}, or a dict by name."
            )
        dynamic = dict(zip(bound, dynamic, strict=False))
    unknown = [name for name in dynamic if name not in bound]
    if unknown:
        raise CaptureError(
            f"dynamic names {', '.join(map(repr, unknown))}, but the example inputs are "
            f"{', '.join(bound)}.\nFix: use the names of those arguments."
        )
    return {
        name: dynamic[name] if name in dynamic else pytree.tree_map(lambda _: None, value)
        for name, value in bound.items()
    }
