"""GAQAT: gradient-adaptive quantization-aware training (arXiv 2412.05551), reconstructed."""

from bitwright.methods.gaqat.gaqat import GAQAT, disorder

__all__ = ["GAQAT", "disorder"]
