"""Training methods, one folder each: what else happens in a training step."""

from bitwright.methods.base import Batch, Method
from bitwright.methods.kd import KD

__all__ = ["KD", "Batch", "Method"]
