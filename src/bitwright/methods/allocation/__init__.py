"""Bit allocation: widths solved for once from measured sensitivities (the family of HAWQ-V3 and OHQ)."""

from bitwright.methods.allocation.allocation import Allocation
from bitwright.methods.allocation.sensitivity import sensitivities

__all__ = ["Allocation", "sensitivities"]
