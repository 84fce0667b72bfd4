"""BWRF: block-wise replacement on a frozen full-precision partner (arXiv 2412.15846), reconstructed."""

from bitwright.methods.bwrf.blocks import find_blocks
from bitwright.methods.bwrf.bwrf import BWRF, branch_weights, fade_factor

__all__ = ["BWRF", "branch_weights", "fade_factor", "find_blocks"]
