"""The plan: a compiled model as plain data, which the runtime executes step by step.

A plan is JSON in an artifact. It names operators (``aten.NAME.OVERLOAD``, ``fpc.NAME``,
``py.NAME``), tensors by key, and values by name; it holds no code. Everything read from JSON is
checked here, so that the executor meets only well-formed plans.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypeAlias

from fpcompiler.errors import ArtifactError
from fpcompiler.tree import Spec, check_spec, leaf_count

PLAN_VERSION: Final = 2
"""Version of the JSON form; a reader refuses a newer one."""

DTYPES: Final = (
    "float64", "float32", "float16", "bfloat16",
    "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
)  # fmt: skip
"""Names of the dtypes that a value, an argument or a stored tensor may have."""

Argument: TypeAlias = Any
"""A JSON value; a dict with one key stands for what JSON lacks, see :data:`MARKERS`."""

MARKERS: Final = ("v", "dtype", "device", "layout", "memory_format", "f")
"""Keys of one-entry dicts in arguments: a value by name (``{"v": "x"}``), a dtype, a device (bound
to the executor's), a layout, a memory format, a float that JSON cannot write (inf, -inf, nan)."""

_OP: Final = re.compile(r"aten\.\w+\.\w+|fpc\.\w+|py\.\w+", re.ASCII)
_MAX_DEPTH: Final = 8
_Scalar: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model's ``forward``.

    Attributes:
        name: Its name in ``forward``.
        spec: What was passed for it when the model was captured. None: nothing was, so that
            nothing may be passed for it later; ``{"t": "none"}``: it was None (or left out, with
            None as its default).
    """

    name: str
    spec: Spec | None = None


@dataclass(frozen=True)
class Signature:
    """How the compiled model is called.

    Attributes:
        parameters: The parameters of ``forward``, in order.
        outputs: The nesting of the result.
        fixed: Arguments that are part of the program, ``use_cache=False``; a call may repeat them.
    """

    parameters: tuple[Parameter, ...]
    outputs: Spec
    fixed: Mapping[str, _Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Placeholder:
    """One tensor that a call passes in; ``shape`` holds sizes and names of symbols.

    An entry such as ``"2*s0"`` (an expression) is allowed and is not checked at the call.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Symbol:
    """The range of a size that may differ from call to call; ``max`` None means unbounded."""

    min: int = 0
    max: int | None = None


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        op: ``aten.NAME.OVERLOAD``, ``fpc.NAME``, or ``py.NAME`` for arithmetic on sizes.
        args: Positional arguments, encoded (:data:`MARKERS`).
        kwargs: Keyword arguments, encoded.
        outs: Names of the results. With one name it is the result itself (a list if the operator
            returns a list); with several, one per item. The results of ``fpc`` operators that
            return lists are always named one by one.
        layer: Module path of the layer that this belongs to, or empty.
        kernel: The backend that runs it; empty means ``reference``.
    """

    op: str
    args: tuple[Argument, ...]
    outs: tuple[str, ...]
    kwargs: Mapping[str, Argument] = field(default_factory=dict)
    layer: str = ""
    kernel: str = ""

    def uses(self) -> Iterator[str]:
        """Yield the names of the values that the step reads."""
        yield from used_values([*self.args, *self.kwargs.values()])


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer: a row of the table that ``CompiledModel.plan()`` shows.

    Attributes:
        name: Module path of the layer.
        op: What it is: ``linear``, ``conv2d``, ``embedding``.
        shape: Shape of its weight, ``(N, K)`` for a linear layer.
        weight, activation: Text of the operand, or a dtype.
        kernel, reason: The backend that runs it; why it has this format and kernel.
        bytes_before, bytes_after: Bytes of the weight as captured, and now with its scales.
        quantized: Whether the weight is quantized.
        rule, role: The rule of the scheme that decided; what the layer is in the model.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    weight: str
    activation: str
    kernel: str
    reason: str
    bytes_before: int
    bytes_after: int
    quantized: bool
    rule: str = ""
    role: str = ""


@dataclass(frozen=True)
class Plan:
    """A whole program.

    Attributes:
        signature: How it is called.
        placeholders: One per leaf of the parameters' specs, in order.
        steps: The operations, in program order. Every value is assigned once.
        outputs: One per leaf of ``signature.outputs``: the name of a value, or a JSON scalar that
            is not a text.
        symbols: Range per symbol.
        constants: Value name to tensor key.
        state: Value name to tensor key, for tensors that live from call to call (KV caches).
        stores: Pairs (value, state value): copied at the end of a run.
        layers: The rows of the plan table.
        version: Version of the JSON form.
    """

    signature: Signature
    placeholders: tuple[Placeholder, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str | int | float | bool | None, ...]
    symbols: Mapping[str, Symbol] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    stores: tuple[tuple[str, str], ...] = ()
    layers: tuple[LayerRow, ...] = ()
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        """Check that every name is defined once, before its use.

        Raises:
            ArtifactError: If the program is not well formed.
        """
        _check_program(self)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; :meth:`from_json` reads them back."""
        return {f.name: _jsonable(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Return the plan that JSON values describe.

        Raises:
            ArtifactError: If they describe none; the message says which part is wrong.
        """
        return _read_plan(data)


def used_values(argument: Argument) -> Iterator[str]:
    """Yield the names of the values in an encoded argument."""
    if isinstance(argument, dict):
        if "v" in argument:
            yield argument["v"]
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from used_values(item)


def _jsonable(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def _check_program(plan: Plan) -> None:
    specs = [p.spec for p in plan.signature.parameters if p.spec is not None]
    _need(
        sum(map(leaf_count, specs)) == len(plan.placeholders),
        f"{len(plan.placeholders)} placeholders for {sum(map(leaf_count, specs))} input tensors",
    )
    count = leaf_count(plan.signature.outputs)
    _need(count == len(plan.outputs), f"{len(plan.outputs)} outputs for {count} output leaves")
    names = [p.name for p in plan.placeholders] + [*plan.constants] + [*plan.state]
    defined = set(names)
    _need(len(defined) == len(names), "two inputs or constants have the same name")
    for index, step in enumerate(plan.steps):
        where = f"step {index} ({step.op})"
        missing = [name for name in step.uses() if name not in defined]
        _need(not missing, f"{where} reads {missing[:3]} before any step defines it")
        _need(defined.isdisjoint(step.outs), f"{where} defines {list(step.outs)} again")
        _need(len({*step.outs}) == len(step.outs) > 0, f"{where} needs distinct result names")
        defined.update(step.outs)
    for name in [*(o for o in plan.outputs if isinstance(o, str)), *(s[0] for s in plan.stores)]:
        _need(name in defined, f"the result {name!r} is defined by no step")
    targets = {target for _, target in plan.stores}
    _need(len(targets) == len(plan.stores), "two stores into one state")
    _need(targets <= {*plan.state}, f"a store into {sorted(targets - {*plan.state})}, no state")
    for placeholder in plan.placeholders:
        _check_placeholder(placeholder, plan.symbols)


def _check_placeholder(placeholder: Placeholder, symbols: Mapping[str, Symbol]) -> None:
    where = f"placeholder {placeholder.name!r}"
    _need(placeholder.dtype in DTYPES, f"{where} has the unknown dtype {placeholder.dtype!r}")
    for size in placeholder.shape:
        plain = isinstance(size, str) and size.isidentifier()
        _need(not plain or size in symbols, f"{where} has the unknown symbol {size!r}")
        _need(isinstance(size, str) or size >= 0, f"{where} has the size {size}")


def _bad(problem: str) -> ArtifactError:
    return ArtifactError(
        f"The plan is not well formed: {problem}. The artifact is damaged or was written by "
        "another program; compile the model again."
    )


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise _bad(problem)


# Reading: each function takes JSON of unknown shape and the words for its place in the plan.


def _read_plan(data: object) -> Plan:
    version = data.get("version") if isinstance(data, dict) else None
    _need(_is_int(version), "it has no version number")
    if version != PLAN_VERSION:
        raise ArtifactError(
            f"The plan has version {version}; this fpcompiler reads version {PLAN_VERSION}. "
            "Install the fpcompiler that wrote it, or compile the model again."
        )
    plan = _record(data, Plan, "the plan")
    outputs = _list(plan["outputs"], "outputs")
    _need(all(isinstance(o, _Scalar) for o in outputs), "an output is neither name nor number")
    stores = [_names(pair, "a store") for pair in _list(plan["stores"], "stores")]
    _need(all(len(pair) == 2 for pair in stores), "a store is no pair of names")
    return Plan(
        signature=_read_signature(_record(plan["signature"], Signature, "the signature")),
        placeholders=tuple(map(_read_placeholder, _list(plan["placeholders"], "placeholders"))),
        steps=tuple(_read_step(s, i) for i, s in enumerate(_list(plan["steps"], "steps"))),
        outputs=tuple(outputs),
        symbols={k: _read_symbol(k, v) for k, v in _dict(plan["symbols"], "symbols").items()},
        constants=_name_map(plan["constants"], "constants"),
        state=_name_map(plan["state"], "state"),
        stores=tuple((pair[0], pair[1]) for pair in stores),
        layers=tuple(_read_row(row) for row in _list(plan["layers"], "layers")),
    )


def _read_signature(data: dict[str, Any]) -> Signature:
    parameters = []
    for item in _list(data["parameters"], "parameters"):
        entry = _record(item, Parameter, "a parameter")
        name, spec = _text(entry["name"], "the name of a parameter"), entry["spec"]
        parameters.append(Parameter(name, None if spec is None else check_spec(spec, name)))
    names = [p.name for p in parameters]
    _need(len({*names}) == len(names), "two parameters have the same name")
    fixed = _dict(data["fixed"], "fixed arguments")
    _need(all(isinstance(v, _Scalar) for v in fixed.values()), "a fixed argument is no JSON scalar")
    return Signature(tuple(parameters), check_spec(data["outputs"], "the outputs"), fixed)


def _read_placeholder(data: object) -> Placeholder:
    entry = _record(data, Placeholder, "a placeholder")
    name = _text(entry["name"], "a placeholder's name")
    shape = _list(entry["shape"], f"the shape of {name!r}")
    good = all(_is_int(size) or isinstance(size, str) for size in shape)
    _need(good and len(shape) <= 16, f"the shape of {name!r} is {shape}")
    return Placeholder(name, _text(entry["dtype"], f"the dtype of {name!r}"), tuple(shape))


def _read_symbol(name: str, data: object) -> Symbol:
    entry = _record(data, Symbol, f"symbol {name!r}")
    low, high = entry["min"], entry["max"]
    good = _is_int(low) and low >= 0 and (high is None or (_is_int(high) and high >= low))
    _need(good, f"symbol {name!r} has the range {low}..{high}")
    return Symbol(low, high)


def _read_step(data: object, index: int) -> Step:
    where = f"step {index}"
    entry = _record(data, Step, where)
    op = _text(entry["op"], f"the operator of {where}")
    _need(_OP.fullmatch(op) is not None, f"{where} has the operator {op!r}")
    args = _list(entry["args"], f"the arguments of {where}")
    kwargs = _dict(entry["kwargs"], f"the keywords of {where}")
    for argument in [*args, *kwargs.values()]:
        _check_argument(argument, f"{where} ({op})", 0)
    outs = _names(entry["outs"], f"the results of {where}")
    layer, kernel = (_text(entry[key], f"{key} of {where}") for key in ("layer", "kernel"))
    return Step(op, tuple(args), outs, kwargs, layer, kernel)


def _check_argument(argument: object, where: str, depth: int) -> None:
    _need(depth <= _MAX_DEPTH, f"an argument of {where} nests too deep")
    if isinstance(argument, list):
        for item in argument:
            _check_argument(item, where, depth + 1)
    elif isinstance(argument, dict):
        (key, value), *more = [*argument.items()] or [("", None)]
        good = key in MARKERS and isinstance(value, str) and not more
        _need(good, f"an argument of {where} is {str(argument)[:60]}")
    else:
        finite = not isinstance(argument, float) or math.isfinite(argument)
        _need(finite and isinstance(argument, _Scalar), f"an argument of {where} is {argument!r}")
        small = not isinstance(argument, int) or -(2**63) <= argument < 2**63
        _need(small, f"an argument of {where} does not fit into 64 bits")


def _read_row(data: object) -> LayerRow:
    entry = _record(data, LayerRow, "a row of layers")
    where = f"row {str(entry['name'])[:60]!r}"
    names = ("name", "op", "weight", "activation", "kernel", "reason", "rule", "role")
    texts = {k: _text(entry[k], f"{k} of {where}") for k in names}
    shape = _list(entry["shape"], f"the shape of {where}")
    counts = [*shape, entry["bytes_before"], entry["bytes_after"]]
    _need(all(_is_int(n) and n >= 0 for n in counts), f"{where} has a size that is no number")
    _need(isinstance(entry["quantized"], bool), f"{where} does not say whether it is quantized")
    return LayerRow(**{**entry, **texts, "shape": tuple(shape)})


def _record(data: object, cls: type[Any], where: str) -> dict[str, Any]:
    entry = _dict(data, where)
    wanted = {f.name for f in fields(cls)}
    _need({*entry} == wanted, f"{where} should have the fields {sorted(wanted)}")
    return entry


def _dict(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _bad(f"{where}: expected an object")
    return data


def _list(data: object, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise _bad(f"{where}: expected a list")
    return data


def _text(data: object, where: str) -> str:
    if not isinstance(data, str):
        raise _bad(f"{where}: expected a text")
    return data


def _names(data: object, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where) for item in _list(data, where))


def _name_map(data: object, where: str) -> dict[str, str]:
    return {k: _text(v, f"{where}[{k!r}]") for k, v in _dict(data, where).items()}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
