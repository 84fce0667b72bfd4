"""EWGS: the scaling factor re-estimated from the Hessian (Lee, Kim, Ham, CVPR 2021)."""

from bitwright.methods.ewgs.ewgs import EWGSDelta, delta_from_curvature, mean_curvatures

__all__ = ["EWGSDelta", "delta_from_curvature", "mean_curvatures"]
