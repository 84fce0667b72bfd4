"""HGQ: bit-widths by the gradient of the loss (arXiv 2405.00645)."""

from bitwright.methods.hgq.gradient import with_bit_gradient
from bitwright.methods.hgq.hgq import HGQ

__all__ = ["HGQ", "with_bit_gradient"]
