"""Fake quantization as functions: the one place where rounding happens during training."""

from bitwright.kernels.reference import fake_quantize

__all__ = ["fake_quantize"]
