"""Deployment: the frozen integer form, the file that a runtime opens, and the proof that they are one network."""

from bitwright.deploy.bench import BenchReport, bench
from bitwright.deploy.comparison import VerifyReport
from bitwright.deploy.export import export
from bitwright.deploy.files import ExportReport
from bitwright.deploy.freeze import freeze
from bitwright.deploy.snap import snap_biases
from bitwright.deploy.targets.packed import load_packed
from bitwright.deploy.verify import verify

__all__ = [
    "BenchReport",
    "ExportReport",
    "VerifyReport",
    "bench",
    "export",
    "freeze",
    "load_packed",
    "snap_biases",
    "verify",
]
