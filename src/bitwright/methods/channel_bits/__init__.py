"""Bits per output channel from the kurtosis of weights (MPQ-DM, arXiv 2412.11549)."""

from bitwright.methods.channel_bits.channel_bits import ChannelBits
from bitwright.methods.channel_bits.choice import kurtosis, spread_bits

__all__ = ["ChannelBits", "kurtosis", "spread_bits"]
