"""torchvision and timm, imported so that they work beside a CPU build of torch.

A torchvision wheel built for CUDA cannot load its compiled operators beside a CPU-only torch, and then stops at
`operator torchvision::nms does not exist` while it registers shape functions for them. Models and transforms need
none of those operators: declaring the two schemas lets the rest of the package import.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from bitwright.errors import BitwrightError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def import_torchvision() -> Any:
    """The torchvision module.

    Raises: BitwrightError where torchvision is not installed, naming the extra that brings it.
    """
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error) or _kept:
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    return _import("torchvision")


def import_timm() -> Any:
    """The timm module; torchvision, which timm imports, is imported first.

    Raises: BitwrightError where timm or torchvision is not installed.
    """
    import_torchvision()
    return _import("timm")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise BitwrightError(f'{name} is not installed: pip install "bitwright[vision]"') from error
