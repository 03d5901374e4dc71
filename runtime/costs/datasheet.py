"""Ceilings of GPUs that nothing was measured on: a roofline, without launches.

Dense rates as the vendor states them: NVIDIA's data sheet of HGX B200 for one of its eight GPUs,
and the white paper on the RTX Blackwell architecture for an RTX 5090 (sums in fp32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fpcompiler.runtime.costs.call import LayerCall, Prediction
from fpcompiler.target import TARGETS


@dataclass(frozen=True)
class Datasheet:
    """What a vendor says.

    Attributes:
        device: Of which GPU.
        bandwidth: Bytes per microsecond.
        rates: Operations per microsecond by the name of the :class:`fpcompiler.target.GemmKind`.
    """

    device: str
    bandwidth: float
    rates: Mapping[str, float]

    def bf16_microseconds(self, m: int, n: int, k: int) -> float:
        """Return the least time that a product in bf16 can take."""
        read = 2 * (n * k + m * k + m * n) / self.bandwidth
        return max(read, 2 * m * n * k / self.rates["bf16"])


def _rates(fp4: float, fp8: float, bf16: float) -> Mapping[str, float]:
    """Return the rates of kinds, from those of instructions in 10**12 per second."""
    kinds = {"mxf4": fp4, "nvf4": fp4, "mxf8f6f4": fp8, "f8f6f4": fp8, "bf16": bf16}
    return MappingProxyType({name: rate * 1e6 for name, rate in kinds.items()})


DATASHEETS: Final[Mapping[str, Datasheet]] = MappingProxyType(
    {
        "sm_100a": Datasheet("NVIDIA B200", 8.0e6, _rates(9000, 4500, 2250)),
        "sm_120a": Datasheet("NVIDIA RTX 5090", 1.792e6, _rates(1676, 419, 209.5)),
    }
)
"""By target."""


def predict_from_datasheet(gpu: str, call: LayerCall) -> Prediction | str:
    """Return the least times that a layer that is alone can take, or why there is none.

    Args:
        gpu: A name in :data:`DATASHEETS`.
        call: The layer.
    """
    sheet = DATASHEETS[gpu]
    kind = TARGETS[gpu].kind_for(call.weight, call.activation)
    if kind is None or kind.name == "bf16" or call.activation is None:
        return f"there are no kernels for w={call.weight},a={call.activation or 'none'} on {gpu}"
    codes = call.m * call.k * call.activation.bits_per_value(call.k) / 8
    inputs, outputs = 2 * call.m * call.k, 2 * call.m * call.n
    quantizing = (inputs + codes) / sheet.bandwidth
    read = (call.weight_bytes + codes + outputs) / sheet.bandwidth
    return Prediction(
        quantizing + max(read, call.operations / sheet.rates[kind.name]),
        sheet.bf16_microseconds(call.m, call.n, call.k),
    )
