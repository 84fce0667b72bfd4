"""Deployment: the frozen integer form, the file that a runtime opens, and the proof that they are one network."""

from bitwright.deploy.export import ExportReport, export
from bitwright.deploy.freeze import freeze, snap_biases

__all__ = ["ExportReport", "export", "freeze", "snap_biases"]
