"""Calibration data from the user's own code: the calls that a model gets while that code runs.

A diffusion model meets other inputs at each step of its sampler, made by its own steps before, so
that only the sampler itself can show them. The code of FP4DiT (arXiv 2503.15465) hands the numbers
0 to 19 of its steps to the model as timesteps of a schedule of 1000, and so calibrates on pictures
with next to no noise. Here the sampler runs, and a sample of its calls is kept.
"""

from __future__ import annotations

import difflib
import inspect
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpcompiler.arguments import require_type
from fpcompiler.errors import FpcompilerError, OptionError, RunError
from fpcompiler.tree import spec_of

Recorded: TypeAlias = tuple[Any, ...] | dict[str, Any]
"""Positional arguments of a call, or all of its arguments by name."""

Balance: TypeAlias = str | Callable[..., Any] | None

_NONE: Final = type(None)
_SCALARS: Final = (bool, int, float, str, _NONE)
_NAMED: Final = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)


@contextmanager
def record(
    model: nn.Module, *, limit: int = 32, balance: Balance = None, seed: int = 0
) -> Iterator[list[Recorded]]:
    """Note the calls of a model while other code runs, as calibration data for ``compile``.

    ::

        with fpcompiler.record(pipe.transformer, limit=40, balance="timestep") as calls:
            for prompt in prompts:
                pipe(prompt, num_inference_steps=20)
        compiled = fpcompiler.compile(pipe.transformer, "fp4dit", calibration=calls)

    The code that runs may be anything that calls ``model(...)``: a sampler, a loop that generates
    text, an evaluation. What the model returns does not change.

    Args:
        model: The module that will be compiled; it may be a part of what the code calls.
        limit: How many calls are kept, and so how much memory is taken. They are a sample in which
            each call has the same chance, within what ``balance`` asks for.
        balance: What must be represented equally. The name of an argument that has one value
            throughout each call, such as the timestep; or a function of the arguments of a call,
            given as the code gives them, that returns such a value or a tuple of values:
            ``lambda x, t, y: (t[0], bool((y == 10).all()))``. By default nothing.
        seed: Decides which calls are kept; the same calls and seed give the same result.

    Yields:
        A list that is empty until the block ends. Then it holds the calls in the order in which
        they came: a tuple of positional arguments each, or a dict if there are keyword arguments,
        with the positional ones under their names. Tensors are copies on the CPU without gradients.

    Raises:
        OptionError: If an option has an unusable value, the model was not called, or what
            ``balance`` names has several values in a call.
        RunError: If an argument is something that no compiled model takes.
    """
    require_type("model", model, (nn.Module,), "the module that will be compiled")
    _check_count("limit", limit, 1)
    _check_count("seed", seed, 0)
    recorder = _Recorder(model, _Keys.of(model, balance), _Sample(limit, random.Random(seed)))
    calls: list[Recorded] = []
    # Before the hooks of others: they run again when the recorded call is made.
    handle = model.register_forward_pre_hook(recorder, prepend=True, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
        calls += recorder.sample.in_order()
    recorder.check()


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, not {value!r}.")


class _Recorder:
    """The hook."""

    def __init__(self, model: nn.Module, keys: _Keys, sample: _Sample) -> None:
        self.name = type(model).__name__
        self.signature = inspect.signature(model.forward)
        self.keys = keys
        self.sample = sample

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = self.keys.of_call(args, kwargs)
        self.sample.offer(key, lambda: self._copy(args, kwargs))

    def check(self) -> None:
        """Check that something was recorded, and warn of what has no room."""
        if not self.sample.offered:
            raise OptionError(
                f"record: the {self.name} was not called inside of the with block. Give record() "
                "the module that your code calls as model(...), such as pipe.transformer of a "
                "pipeline; calls of model.forward(...) and of copies of the module are not seen."
            )
        missing = self.sample.missing_keys()
        if missing:
            count = self.sample.keys()
            warnings.warn(
                f"record: {missing} of {count} values of {self.keys.text} are in no call that was "
                f"kept; for all of them, give limit={count} or a multiple of it.",
                stacklevel=4,
            )

    def _copy(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recorded:
        try:
            if kwargs:
                named = self._named(args, kwargs)
                return {name: _copied(f"argument {name!r}", v) for name, v in named.items()}
            return tuple(_copied(f"argument {i + 1}", value) for i, value in enumerate(args))
        except FpcompilerError as error:
            error.add_note(
                f"in a call of {self.name} that record() was to keep; a model that keeps keys and "
                "values is recorded without them: use_cache=False"
            )
            raise

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments by name: a batch of calibration data has one kind."""
        if not args:
            return dict(kwargs)
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        for name in given:
            if self.signature.parameters[name].kind not in _NAMED:
                raise OptionError(
                    f"record: {self.name}.forward takes {name!r} by position only and others by "
                    "name. Record a module around it that takes all of them by name."
                )
        return _by_name(self.signature, given)


@dataclass(frozen=True)
class _Keys:
    """Finds what a call is balanced by."""

    text: str
    find: Callable[..., Any]

    @classmethod
    def of(cls, model: nn.Module, balance: Balance) -> _Keys:
        if balance is None:
            return cls("", lambda *args, **kwargs: None)
        if not isinstance(balance, str):
            if not callable(balance):
                raise OptionError(
                    "balance must be the name of an argument, a function of the arguments, or "
                    f"None, not {type(balance).__name__}."
                )
            return cls("balance", balance)
        signature = inspect.signature(model.forward)
        _check_name(type(model).__name__, signature, balance)
        return cls(
            repr(balance), lambda *args, **kwargs: _argument(signature, balance, args, kwargs)
        )

    def of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        return _key(self.text, self.find(*args, **kwargs))


def _check_name(model: str, signature: inspect.Signature, name: str) -> None:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return
    near = difflib.get_close_matches(name, signature.parameters, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    known = ", ".join(signature.parameters)
    raise OptionError(f"balance: {model} has no argument {name!r}. {hint}It takes: {known}.")


def _argument(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = _by_name(signature, bound.arguments)
    if name not in given:
        raise OptionError(f"balance: a call does not give {name!r}; it gives {', '.join(given)}.")
    return given[name]


def _by_name(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with those that ``forward`` takes as ``**kwargs`` beside the others."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        extra = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found |= value if extra else {name: value}
    return found


def _key(text: str, value: object) -> Hashable:
    """Return a value that can be told from others: numbers in place of tensors.

    Raises:
        OptionError: If a tensor has several values, or there is no telling.
    """
    if isinstance(value, Tensor):
        values = value.detach().flatten()
        if not len(values) or bool((values != values[0]).any()):
            count = "several values" if len(values) else "no value"
            raise OptionError(
                f"{text} has {count} in one call, so the call cannot be counted as one of them. "
                "Give balance= a function of the arguments that returns one value."
            )
        return _key(text, values[0].item())
    if isinstance(value, tuple):
        return tuple(_key(text, item) for item in value)
    if not isinstance(value, Hashable):
        raise OptionError(
            f"{text} gives a {type(value).__name__}, which cannot be counted. Give balance= a "
            "function that returns a number, a text or a tuple of them."
        )
    return value


def _copied(where: str, value: Any) -> Any:
    """Return an argument with copies of its tensors.

    Raises:
        RunError: If it is something that no compiled model takes.
    """
    spec_of(value, where)  # It raises.
    for leaf in pytree.tree_leaves(value):
        if not isinstance(leaf, (Tensor, *_SCALARS)):
            raise RunError(
                f"{where} holds a {type(leaf).__name__}, which cannot be copied. Give the model a "
                "plain dict, list or tuple in its place."
            )
    # Tensors made in inference mode could not be learned from.
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map_only(Tensor, _on_cpu, value)


def _on_cpu(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", requires_grad=False).copy_(tensor)


@dataclass
class _Kept:
    """What is kept of the calls with one key: those of the lowest ranks, by rank.

    Attributes:
        order: Decides between keys.
        below: Calls of this rank or more are not kept.
        calls: For each rank the number of the call, and the call.
    """

    order: float
    below: float = 1.0
    calls: dict[float, tuple[int, Recorded]] = field(default_factory=dict)

    def drop(self) -> None:
        self.below = max(self.calls)
        del self.calls[self.below]


class _Sample:
    """A sample of calls that come one by one: as many for each key, in all at most ``limit``.

    Each call gets a random rank and each key keeps the calls of its lowest ranks, down from a bound
    that only falls, so all calls of a key have the same chance. Where there are too many, the key
    with the most calls loses the one of the highest rank.
    """

    def __init__(self, limit: int, generator: random.Random) -> None:
        self.offered = 0
        self._limit = limit
        self._random = generator
        self._kept: dict[Hashable, _Kept] = defaultdict(lambda: _Kept(self._random.random()))

    def offer(self, key: Hashable, call: Callable[[], Recorded]) -> None:
        """Keep a call, perhaps; it is only made if it is kept."""
        self.offered += 1
        kept, rank = self._kept[key], self._random.random()
        if rank >= kept.below:
            return
        kept.calls[rank] = (self.offered, ())  # Not made before there is room for it.
        if sum(len(each.calls) for each in self._kept.values()) > self._limit:
            max(self._kept.values(), key=lambda each: (len(each.calls), each.order)).drop()
        if kept.calls.pop(rank, None):
            kept.calls[rank] = (self.offered, call())

    def in_order(self) -> list[Recorded]:
        """Return the calls that are kept, in the order in which they came."""
        numbered = [each for kept in self._kept.values() for each in kept.calls.values()]
        return [call for _, call in sorted(numbered, key=lambda each: each[0])]

    def keys(self) -> int:
        """Return how many keys there were."""
        return len(self._kept)

    def missing_keys(self) -> int:
        """Return how many keys have no call that is kept."""
        return sum(not kept.calls for kept in self._kept.values())
