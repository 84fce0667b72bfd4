"""bitwright: train neural networks at 1 to 8 bits, and ship exactly what was trained.

Public names are loaded on first use: torch, ONNX and its runtime take seconds, which no help page needs.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from bitwright import runtime
    from bitwright.calibrate import calibrate
    from bitwright.compiled import compile_model
    from bitwright.coverage import Coverage, coverage
    from bitwright.deploy import export, freeze, load_packed, snap_biases, verify
    from bitwright.layers.reproducible import make_reproducible
    from bitwright.methods import (
        AMED,
        BWRF,
        CAGE,
        CSQ,
        GAQAT,
        HGQ,
        KD,
        SAQ,
        AdaQAT,
        Allocation,
        Batch,
        ChannelBits,
        Constrained,
        EWGSDelta,
        Method,
        PEGECurriculum,
        QuantNet,
        Relational,
    )
    from bitwright.prepare import describe, prepare, quant_layers, quantizers, split_parameters
    from bitwright.quantizer import Quantizer
    from bitwright.rules import Rule, rules
    from bitwright.runtime.timing import measure_latencies
    from bitwright.spec import QuantizerSpec
    from bitwright.step import Step, StepResult
    from bitwright.topology import topology

__version__ = "0.1.0"

__all__ = [
    "AMED",
    "BWRF",
    "CAGE",
    "CSQ",
    "GAQAT",
    "HGQ",
    "KD",
    "SAQ",
    "AdaQAT",
    "Allocation",
    "Batch",
    "BitwrightError",
    "ChannelBits",
    "Constrained",
    "Coverage",
    "EWGSDelta",
    "Method",
    "PEGECurriculum",
    "QuantNet",
    "Quantizer",
    "QuantizerSpec",
    "Relational",
    "Rule",
    "Step",
    "StepResult",
    "calibrate",
    "compile_model",
    "coverage",
    "describe",
    "export",
    "freeze",
    "load_packed",
    "make_reproducible",
    "measure_latencies",
    "prepare",
    "quant_layers",
    "quantizers",
    "rules",
    "runtime",
    "snap_biases",
    "split_parameters",
    "topology",
    "verify",
]

# The modules of names that do not come from `methods`.
_HOMES = {
    "calibrate": ("calibrate",),
    "compiled": ("compile_model",),
    "coverage": ("Coverage", "coverage"),
    "deploy": ("export", "freeze", "load_packed", "snap_biases", "verify"),
    "layers.reproducible": ("make_reproducible",),
    "prepare": ("describe", "prepare", "quant_layers", "quantizers", "split_parameters"),
    "quantizer": ("Quantizer",),
    "rules": ("Rule", "rules"),
    "runtime.timing": ("measure_latencies",),
    "spec": ("QuantizerSpec",),
    "step": ("Step", "StepResult"),
    "topology": ("topology",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return importlib.import_module("bitwright.runtime")
    if name not in __all__:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bitwright.{_HOME.get(name, 'methods')}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Python binds a submodule to its package on import; here it may not hide a function (`bitwright.calibrate`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
