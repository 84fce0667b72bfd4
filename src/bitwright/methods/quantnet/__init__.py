"""QuantNet: a small network that binarizes weights while training (arXiv 2009.04626), a reconstruction."""

from bitwright.methods.quantnet.network import MetaNetwork
from bitwright.methods.quantnet.quantnet import QuantNet

__all__ = ["MetaNetwork", "QuantNet"]
