"""Quantized layers: subclasses of torch's own that own `weight_quantizer` and `input_quantizer`.

A float layer becomes a quantized one in place (`module.__class__ = QuantConv2d`), so identity, parameter names, tied
weights and float checkpoints stay what they were.
"""

from bitwright.layers.add import Add, QuantAdd
from bitwright.layers.attention import QuantMultiheadAttention, scaled_dot_product
from bitwright.layers.base import QuantLayer
from bitwright.layers.conv import QuantConv, QuantConv1d, QuantConv2d, QuantConv2dSame, QuantConv3d
from bitwright.layers.linear import QuantEmbedding, QuantLinear, QuantProduct
from bitwright.layers.output import (
    LOST,
    OUTPUT,
    SharedInput,
    attach_output,
    detach_output,
    has_output,
    lost_hooks,
    quantizer_in,
    takes_output,
)
from bitwright.layers.swap import (
    COMPUTING,
    CONVOLUTIONS,
    candidates,
    float_products,
    has_products,
    is_quantized,
    multiplies,
    quantizable,
    swap,
    target_class,
    unswap,
    why_not,
    without_form,
)
from bitwright.layers.transposed import (
    QuantConvTranspose,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from bitwright.layers.waiting import QuantBatchNorm2d, QuantGELU, let_wait

__all__ = [
    "COMPUTING",
    "CONVOLUTIONS",
    "LOST",
    "OUTPUT",
    "Add",
    "QuantAdd",
    "QuantBatchNorm2d",
    "QuantConv",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv2dSame",
    "QuantConv3d",
    "QuantConvTranspose",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantGELU",
    "QuantLayer",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantProduct",
    "SharedInput",
    "attach_output",
    "candidates",
    "detach_output",
    "float_products",
    "has_output",
    "has_products",
    "is_quantized",
    "let_wait",
    "lost_hooks",
    "multiplies",
    "quantizable",
    "quantizer_in",
    "scaled_dot_product",
    "swap",
    "takes_output",
    "target_class",
    "unswap",
    "why_not",
    "without_form",
]
