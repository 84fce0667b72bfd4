"""PEGE: progressive element-wise gradient estimation (arXiv 2509.00097), reconstructed."""

from bitwright.methods.pege.pege import PEGECurriculum, curriculum, discretization_error

__all__ = ["PEGECurriculum", "curriculum", "discretization_error"]
