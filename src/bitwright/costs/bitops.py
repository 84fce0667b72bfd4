"""BitOPs: multiply-accumulates weighed by the bits of both operands."""

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", int, float, Tensor)

FLOAT_BITS = 32


def bitops(macs: Number, weight_bits: Number | float, input_bits: Number | float) -> Number:
    """macs * weight_bits * input_bits, the definition of the mixed-precision literature (FracBits, AdaQAT, HAWQ).

    Args:
        macs: multiply-accumulates, a number or a tensor. weight_bits, input_bits: bits of the operands (32: float);
            tensors pass gradients, so that the bits can be learned.

    Returns:
        The type and shape of the product.
    """
    return macs * weight_bits * input_bits  # pyright: ignore[reportReturnType]
