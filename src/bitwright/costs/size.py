"""Size: bytes of the weights at their own width, and of what stays in float."""

from torch import Tensor

from bitwright.costs.bitops import Number

FLOAT_BYTES = 4


def size_bytes(
    weights: Number, weight_bits: Number | float, float_parameters: int = 0, scales: int = 0
) -> Number | float | Tensor:
    """weights * weight_bits / 8 + 4 * (float_parameters + scales), in bytes.

    Args:
        weights: how many weights. weight_bits: their bits; tensors pass gradients. float_parameters: biases, norms
            and whatever else is stored in 32 bits. scales: of all quantizers, stored in 32 bits too.
    """
    return weights * weight_bits / 8 + FLOAT_BYTES * (float_parameters + scales)
