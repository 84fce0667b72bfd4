"""bitwright: train neural networks at 1 to 8 bits, and ship exactly what was trained."""

from bitwright.calibrate import calibrate
from bitwright.coverage import Coverage, coverage
from bitwright.errors import BitwrightError
from bitwright.methods import KD, Batch, Method
from bitwright.prepare import describe, prepare, quant_layers, quantizers, split_parameters
from bitwright.quantizer import Quantizer
from bitwright.rules import Rule, rules
from bitwright.spec import QuantizerSpec
from bitwright.step import Step, StepResult

__version__ = "0.1.0"

__all__ = [
    "KD",
    "Batch",
    "BitwrightError",
    "Coverage",
    "Method",
    "Quantizer",
    "QuantizerSpec",
    "Rule",
    "Step",
    "StepResult",
    "calibrate",
    "coverage",
    "describe",
    "prepare",
    "quant_layers",
    "quantizers",
    "rules",
    "split_parameters",
]
