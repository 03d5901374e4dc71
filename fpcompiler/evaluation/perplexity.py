"""Perplexity: how well a language model predicts each token of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation.base import Direction, Model, Program, Result, Task, Track, without_bar
from fpcompiler.evaluation.calls import NAN_HINT, device_of, language_logits, one_program

__all__ = ["Perplexity", "perplexity", "token_losses"]

_ROWS: Final = 128
"""Positions whose logits are in fp64 at a time: those of a whole window can take a gigabyte."""


@final
@dataclass(frozen=True, eq=False)
class Perplexity(Task):
    """Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    Attributes:
        tokens: Token ids [tokens], int64.
        window: Tokens that the model sees at once; windows do not overlap.
        start: A token put before each window, which some models cannot do without; None for none.
    """

    name: ClassVar[str] = "perplexity"
    metric: ClassVar[str] = "perplexity"
    direction: ClassVar[Direction] = Direction.LOWER
    tokens: Tensor
    window: int = 512
    start: int | None = None

    def run(self, model: Model, progress: Track = without_bar) -> Result:
        """Return the perplexity, and how many tokens were predicted."""
        program = one_program(model)
        losses = token_losses(program, self.tokens, self.window, self.start, progress)
        value = float(losses.mean().exp())
        return Result({self.metric: value}, self.direction, len(losses), "tokens")


def perplexity(program: Program, tokens: Tensor, window: int = 512) -> float:
    """Return exp of the mean of :func:`token_losses`."""
    return float(token_losses(program, tokens, window).mean().exp())


def token_losses(
    program: Program,
    tokens: Tensor,
    window: int = 512,
    start: int | None = None,
    progress: Track = without_bar,
) -> Tensor:
    """Return the negative log-likelihood of each predicted token of a text, in fp64 nats.

    The text is cut into windows that do not overlap, each seen alone. The first token of a window
    is not predicted, unless there is a start token before it.

    Args:
        program: Called with token ids [1, tokens]; gives logits [1, tokens, vocabulary].
        tokens: Token ids [tokens].
        window: Tokens of one call at most, with the start token.
        start: A token put before each window.
        progress: Shows a bar for the windows.

    Raises:
        OptionError: If there is nothing to predict, or an id is not in the model's vocabulary.
        NumericsError: If a loss is NaN or infinite; the message says at which token.
        RunError: If the program fails.
    """
    windows = list(_windows(tokens.to(device=device_of(program)), window, start))
    losses = [
        _losses(language_logits(program, ids)[:-1], ids[1:])
        for ids in progress(windows, len(windows), "windows of text")
    ]
    _check_finite(losses)
    return torch.cat(losses)


def _windows(tokens: Tensor, window: int, start: int | None) -> Iterator[Tensor]:
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise OptionError(
            f"token ids are whole numbers in one dimension, not {tokens.dtype} "
            f"{list(tokens.shape)}."
        )
    if window < 2 or len(tokens) + (start is not None) < 2:
        raise OptionError(
            f"with {len(tokens)} tokens in windows of {window} there is no token to predict."
        )
    prefix = tokens.new_tensor([] if start is None else [start])
    for part in torch.split(tokens.long(), window - len(prefix)):
        ids = torch.cat([prefix.long(), part])
        if len(ids) > 1:
            yield ids


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses [tokens] of logits [tokens, vocabulary]."""
    pieces = zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True)
    return torch.cat([nnf.cross_entropy(a.double(), b, reduction="none") for a, b in pieces])


def _check_finite(losses: list[Tensor]) -> None:
    bad = [int((~loss.isfinite()).sum()) for loss in losses]
    for index, count in enumerate(bad):
        if count:
            first = int((~losses[index].isfinite()).nonzero()[0])
            raise NumericsError(
                f"the logits of the model are NaN or infinite: in window {index} of {len(losses)} "
                f"the loss of {count} of {len(losses[index])} tokens, first that of predicted "
                f"token {first}, and in {sum(map(bool, bad))} windows in all. {NAN_HINT}"
            )
