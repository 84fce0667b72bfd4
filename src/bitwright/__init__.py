"""bitwright: train neural networks at 1 to 8 bits, and ship exactly what was trained."""

import importlib
from typing import TYPE_CHECKING, Any

from bitwright.calibrate import calibrate
from bitwright.compiled import compile_model
from bitwright.coverage import Coverage, coverage
from bitwright.errors import BitwrightError
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
    Constrained,
    EWGSDelta,
    Method,
    PEGECurriculum,
)
from bitwright.prepare import describe, prepare, quant_layers, quantizers, split_parameters
from bitwright.quantizer import Quantizer
from bitwright.rules import Rule, rules
from bitwright.spec import QuantizerSpec
from bitwright.step import Step, StepResult
from bitwright.topology import topology

if TYPE_CHECKING:
    from bitwright import runtime
    from bitwright.deploy import export, freeze, load_packed, snap_biases, verify
    from bitwright.runtime.timing import measure_latencies

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
    "Constrained",
    "Coverage",
    "EWGSDelta",
    "Method",
    "PEGECurriculum",
    "Quantizer",
    "QuantizerSpec",
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

_DEPLOY = ("export", "freeze", "load_packed", "snap_biases", "verify")


def __getattr__(name: str) -> Any:
    """Deployment on first use: it brings ONNX and its runtime, which training does not need."""
    if name == "runtime":
        return importlib.import_module("bitwright.runtime")
    if name == "measure_latencies":
        return importlib.import_module("bitwright.runtime.timing").measure_latencies
    if name in _DEPLOY:
        from bitwright import deploy

        return getattr(deploy, name)
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
