"""SAQ: sharpness-aware quantization (arXiv 2111.12273)."""

from bitwright.methods.saq.saq import SAQ

__all__ = ["SAQ"]
