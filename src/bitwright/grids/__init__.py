"""Grids: where the representable values are. One file per grid.

A grid owns the parameters (scale, clipping bound, offset) of one quantized tensor and nothing else; the bit-width
reaches it as a `CodeRange`, the gradient as an estimator.
"""

from typing import Any

from bitwright.errors import BitwrightError, option_error
from bitwright.grids.base import Affine, CodeRange, Grid, Shape, Stats, code_range
from bitwright.grids.dorefa import DoReFa
from bitwright.grids.hard import HardLSQ
from bitwright.grids.lsq import LSQ
from bitwright.grids.lsq_plus import LSQPlus
from bitwright.grids.minmax import MinMax
from bitwright.grids.pact import PACT
from bitwright.grids.sat import SATWeight, sat_input
from bitwright.grids.seq import SEQ
from bitwright.grids.tqt import TQT

GRIDS: dict[str, dict[str, Any]] = {
    "lsq": {"weight": LSQ, "input": LSQ},
    "lsq+": {"weight": LSQPlus, "input": LSQPlus},
    "pact": {"weight": PACT, "input": PACT},
    "dorefa": {"weight": DoReFa, "input": DoReFa},
    "sat": {"weight": SATWeight, "input": sat_input},
    "minmax": {"weight": MinMax, "input": MinMax},
    "seq": {"weight": SEQ, "input": LSQ},
    "tqt": {"weight": TQT, "input": TQT},
    "hard": {"weight": LSQ, "input": HardLSQ},
}

__all__ = [
    "GRIDS",
    "LSQ",
    "PACT",
    "TQT",
    "Affine",
    "CodeRange",
    "DoReFa",
    "Grid",
    "HardLSQ",
    "LSQPlus",
    "MinMax",
    "SATWeight",
    "Shape",
    "Stats",
    "code_range",
    "make_grid",
    "sat_input",
]


def make_grid(name: str, shape: Shape, options: dict[str, Any]) -> Grid:
    """The grid called `name` for a tensor of `shape`; BitwrightError for an unknown name or option."""
    if name not in GRIDS:
        raise BitwrightError(f"grid: {name!r} is unknown; accepted: {', '.join(sorted(GRIDS))}")
    try:
        return GRIDS[name][shape.role](shape, **options)
    except TypeError as error:
        raise option_error(f"grid_options of {name!r}", GRIDS[name][shape.role], error) from None
