"""Knowledge distillation (Hinton, Vinyals, Dean, 2015)."""

from bitwright.methods.kd.kd import KD, kd_loss

__all__ = ["KD", "kd_loss"]
