"""CAGE: curvature-aware gradient estimation (arXiv 2510.18784)."""

from bitwright.methods.cage.cage import CAGE, strength_at

__all__ = ["CAGE", "strength_at"]
