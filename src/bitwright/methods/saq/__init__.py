"""SAQ: sharpness-aware quantization (arXiv 2111.12273)."""

from bitwright.methods.saq.saq import SAQ, perturbations

__all__ = ["SAQ", "perturbations"]
