"""The tensors of a program, outside the IR: a name for each ``ml_program.global``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch

from fpcompiler.errors import IRError


class Weights(MutableMapping[str, torch.Tensor]):
    """Tensors by symbol name; the IR declares their types, this holds their values.

    A tensor of a format narrower than 8 bits is stored packed (see :mod:`fpcompiler.numerics`), so
    its shape here differs from its shape in the IR.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self._tensors: dict[str, torch.Tensor] = dict(tensors or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the tensor.

        Raises:
            IRError: If there is none of that name, as when a dump was loaded without its weights.
        """
        if name not in self._tensors:
            raise IRError(
                f"The value of @{name} is not loaded. A pass that reads weights needs them: give "
                "the file that holds them (fpcompiler opt --weights FILE)."
            )
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.detach()

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def unused_name(self, wanted: str) -> str:
        """Return the name, or the name with a number where it is taken."""
        name, number = wanted, 2
        while name in self._tensors:
            name, number = f"{wanted}.{number}", number + 1
        return name

    def keep(self, names: set[str]) -> None:
        """Forget every tensor that is not named."""
        self._tensors = {name: value for name, value in self._tensors.items() if name in names}
