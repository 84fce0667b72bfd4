"""Networks by name: our own small ones, and anything of torchvision and timm."""

from bitwright.training.models.build import OWN_MODELS, build_model

__all__ = ["OWN_MODELS", "build_model"]
