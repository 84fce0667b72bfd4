"""Gradients across the rounding: what crosses when the forward pass rounds.

Every estimator is a module called as `estimator(v, lo, hi) -> k`: `v` are values in units of codes (any shape),
`lo` and `hi` (shape (1,)) the smallest and largest code, and `k` the integer codes `round(clip(v, lo, hi))`,
exact in floating point (ties to even). Estimators differ in the gradient that `v` receives, and in nothing else;
only PEGE, while training at a rate below 1, also leaves some elements unrounded.
A `kernel_rule` names the fused kernels' form of the same gradient, where they have it.
"""

from typing import Any

from bitwright.errors import BitwrightError, option_error
from bitwright.estimators.dsq import DSQ
from bitwright.estimators.ewgs import EWGS
from bitwright.estimators.pege import PEGE
from bitwright.estimators.ste import STE, ClippedSTE

ESTIMATORS = {"ste": STE, "clipped_ste": ClippedSTE, "ewgs": EWGS, "dsq": DSQ, "pege": PEGE}

__all__ = ["DSQ", "ESTIMATORS", "EWGS", "PEGE", "STE", "ClippedSTE", "make_estimator"]


def make_estimator(name: str, options: dict[str, Any]) -> STE | ClippedSTE | EWGS | DSQ | PEGE:
    """The estimator called `name` with keyword `options`; BitwrightError for an unknown name or option."""
    if name not in ESTIMATORS:
        raise BitwrightError(f"estimator: {name!r} is unknown; accepted: {', '.join(sorted(ESTIMATORS))}")
    try:
        return ESTIMATORS[name](**options)
    except TypeError as error:
        raise option_error(f"estimator_options of {name!r}", ESTIMATORS[name], error) from None
