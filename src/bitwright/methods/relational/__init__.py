"""Relational distillation: which pixels resemble which, as in the teacher (MPQ-DM, arXiv 2412.11549)."""

from bitwright.methods.relational.relational import Relational, relation, relational_loss

__all__ = ["Relational", "relation", "relational_loss"]
