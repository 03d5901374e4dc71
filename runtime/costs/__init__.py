"""How long layers take on GPUs, quantized and in bf16: arithmetic on sizes, no graph, no tensors.

Where times were measured (:data:`MEASURED`), a model is fitted to them; elsewhere there are the
ceilings of a data sheet, and what follows from those is called an estimate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fpcompiler.runtime.costs.call import SLOWER, LayerCall, Prediction
from fpcompiler.runtime.costs.datasheet import DATASHEETS, predict_from_datasheet
from fpcompiler.runtime.costs.hopper import GPU, hopper_costs

__all__ = [
    "LayerCall",
    "Prediction",
    "predict",
    "bf16_microseconds",
    "source_of",
    "GPUS",
    "MEASURED",
    "SLOWER",
]

MEASURED: Final = (GPU,)
"""GPUs on which layers were timed."""

GPUS: Final = (*MEASURED, *DATASHEETS)
"""All GPUs that there are predictions for."""


def predict(gpu: str, call: LayerCall) -> Prediction | str:
    """Return the times of a layer on a GPU, or why there is no prediction.

    Args:
        gpu: A name in :data:`GPUS`.
        call: The layer.
    """
    if not call.together or call.activation is None:
        return _alone(gpu, call)
    whole = _alone(gpu, replace(call, n=sum(call.together), together=()))
    if isinstance(whole, str):
        return whole
    # Each gets the part of the time that it has of the time in bf16, so that all gain alike.
    times = [bf16_microseconds(gpu, call.m, n, call.k) for n in call.together]
    own = bf16_microseconds(gpu, call.m, call.n, call.k)
    return Prediction(whole.microseconds * own / sum(times), own)


def _alone(gpu: str, call: LayerCall) -> Prediction | str:
    if gpu in MEASURED:
        return hopper_costs().predict(call)
    return predict_from_datasheet(gpu, call)


def bf16_microseconds(gpu: str, m: int, n: int, k: int) -> float:
    """Return the time of a product in bf16.

    Args:
        gpu: A name in :data:`GPUS`.
        m: Tokens.
        n: Output channels.
        k: Input channels.
    """
    if gpu in MEASURED:
        return hopper_costs().plain.microseconds(m, n, k)
    return DATASHEETS[gpu].bf16_microseconds(m, n, k)


def source_of(gpu: str) -> str:
    """Return in words what predictions for a GPU rest on."""
    if gpu not in MEASURED:
        return f"estimated from the data sheet of an {DATASHEETS[gpu].device}, never measured"
    record = hopper_costs().record
    errors, (least, most) = record["errors"], record["sizes"]
    return (
        f"predicted from times of layers with {least} to {most} inputs and outputs on an "
        f"{record['device']} of {record['date']} (error of these: median {errors['median']:.0%}, "
        f"worst {errors['worst']:.0%})"
    )
