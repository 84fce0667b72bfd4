"""Quantization as constrained learning, by primal and dual steps (arXiv 2210.15623)."""

from bitwright.methods.constrained.constrained import Constrained, soft_cross_entropy

__all__ = ["Constrained", "soft_cross_entropy"]
