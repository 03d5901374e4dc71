"""How roundings are learned, and why learning ended.

The defaults were found on inputs with correlated channels of different size, by the output error on
tokens that were not learned from, relative to round-to-nearest:

* A transformer block of width 64 (attention and MLP), E2M1 with group 128, 500 iterations. The rate
  matters most: 0.451, 0.330, 0.247, 0.176 for 0.003, 0.01, 0.03, 0.1 with a regularizer of 100. The
  regularizer must be strong, or values stay undecided and the last rounding undoes what was
  learned: at a rate of 0.03, 0.827, 0.687, 0.357, 0.247, 0.215, 0.217 for 0.1, 1, 10, 100, 300,
  1000. With the defaults 0.176, and 0.138 after 1500 and 2500 iterations; E3M0, E1M2 and E2M3 end
  at 0.19, 0.15 and 0.19. ``SCALE_AWARE`` is between 10% better (E1M2) and 50% worse (E3M0).
* A layer of 256, 512 or 1152 inputs with its Gram matrix: 0.12 to 0.14 in E2M1, E3M0, E1M2 and
  E2M3, after 100 iterations already; without the flips that follow it is 0.33, and with these alone
  0.13. With inputs of weaker correlation it is 0.53 (E3M0: 0.55).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from fpcompiler.errors import OptionError
from fpcompiler.numerics.adaround.soft import Parametrization


@dataclass(frozen=True)
class RoundOptions:
    """How roundings are learned.

    Attributes:
        iterations: Steps of Adam at most.
        learning_rate: Of Adam, for the logits.
        regularizer: Weight of the regularizer, a mean over the values, beside the loss, which is
            relative to that of round-to-nearest.
        batch: Samples in a step; a layer with a Gram matrix takes all tokens in each.
        parametrization: What is learned.
        seed: Decides which samples are in which step.
        patience: Learning ends after so many checks without a gain; there are 25 of them, the first
            five within the warm-up, where they do not count. 0 never ends it.
        seconds: About what learning may take; None for no limit. Fewer iterations are then planned
            after the first few have been timed, so that the result depends on the machine.
        mixed_precision: On CUDA, compute the outputs of the soft weights in bfloat16. What decides
            about a result is computed in fp32 always.
    """

    iterations: int = 2500
    learning_rate: float = 0.1
    regularizer: float = 300.0
    batch: int = 4
    parametrization: Parametrization = Parametrization.LOGIT
    seed: int = 0
    patience: int = 16
    seconds: float | None = None
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            OptionError: If one is out of range.
        """
        for name, least in (("iterations", 1), ("batch", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise OptionError(
                    f"{name} of learned rounding must be at least {least}, "
                    f"not {getattr(self, name)}."
                )
        for name in ("learning_rate", "regularizer"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(
                    f"{name} of learned rounding must be a positive number, "
                    f"not {getattr(self, name)}."
                )
        if self.seconds is not None and not self.seconds > 0:
            raise OptionError(
                f"seconds for learned rounding must be positive or None, not {self.seconds}."
            )


class Ended(enum.Enum):
    """Why learning ended."""

    ITERATIONS = "all iterations were made"
    PATIENCE = "no more gain"
    TIME = "fewer iterations, for the time given"
