"""A native CPU runtime for exported integer networks, with exact integer Winograd convolutions."""

from bitwright.runtime.build import available
from bitwright.runtime.session import Session, load

__all__ = ["Session", "available", "load"]
