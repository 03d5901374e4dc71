"""What a rounded weight does to a model, in numbers that can be added over layers, and its bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.gptq import output_error
from fpcompiler.numerics.packing import packed_bytes
from fpcompiler.operand import Granularity, Operand


def model_damage(
    weight: Tensor,
    rounded: Tensor,
    sample: Tensor,
    gradients: Tensor,
    tokens: int,
    *,
    layer: str = "",
) -> float:
    """Return the squared change of the model's output, to first order, summed over all tokens.

    It is the sum of ``g**2 e**2`` over tokens and outputs, with ``e`` the error of the layer's
    output and ``g**2`` the squared gradient there: the Fisher-weighted error of LLM-FP4 (arXiv
    2310.16836, section 3.1). Errors of different outputs, tokens and layers are taken as
    independent, so the numbers of layers add up; where errors of many tokens have the same sign and
    are averaged, as those of values are in attention, the change is larger. Token by token, because
    large inputs often are those of tokens that the model's output hardly depends on.

    Args:
        weight: ``[N, K]``.
        rounded: The values that replace it, ``[N, K]``.
        sample: Some of the layer's inputs, ``[S, K]``.
        gradients: Squared gradients at the outputs for these, ``[S, N]``.
        tokens: How many inputs there were in all; the sum over the sample stands for them.
        layer: Named in errors.

    Raises:
        NumericsError: If the shapes do not fit, or the sample is empty.
    """
    outputs, inputs = weight.shape[0], weight.shape[-1]
    fits = weight.shape == rounded.shape and sample.shape[1:] == (inputs,)
    if not fits or not len(sample) or gradients.shape != (len(sample), outputs):
        raise NumericsError(
            f"{describe_layer(layer)}: a weight {list(weight.shape)}, its replacement "
            f"{list(rounded.shape)}, a sample {list(sample.shape)} and gradients "
            f"{list(gradients.shape)} do not fit: [N, K], [N, K], [S, K] and [S, N] are needed."
        )
    errors = sample.float() @ (rounded.float() - weight.float()).T
    weighted = errors.square_().mul_(gradients.to(errors.device))
    return float(weighted.sum(dtype=torch.float64)) * tokens / len(sample)


def output_damage(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Return the squared error of a layer's output, relative to the squares of the output.

    Args:
        weight: ``[N, K]``.
        rounded: The values that replace it, ``[N, K]``.
        gram: ``X^T X`` of the layer's input, ``[K, K]``.

    Returns:
        0 for a layer whose output is zero in any case.

    Raises:
        NumericsError: If the shapes do not fit.
    """
    energy = float(output_error(weight, torch.zeros_like(weight), gram).sum())
    return float(output_error(weight, rounded, gram).sum()) / energy if energy > 0 else 0.0


def stored_bits(rows: int, k: int, operand: Operand) -> int:
    """Return the bits that a quantized weight takes in an artifact: its codes and its scales.

    Args:
        rows: Output channels.
        k: Values in a row.
        operand: Element format and scale levels.
    """
    bits = 8 * rows * packed_bytes(k, operand.format.storage_bits)
    for level in operand.levels:
        width = 32 if level.is_real else 8
        if level.granularity is Granularity.BLOCK:
            bits += width * rows * -(-k // level.block)
        else:
            bits += width * (1 if level.granularity is Granularity.TENSOR else rows)
    return bits
