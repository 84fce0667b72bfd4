"""AdaQAT: adaptive bit-width quantization-aware training (arXiv 2404.16876), in part reconstructed."""

from bitwright.methods.adaqat.adaqat import AdaQAT
from bitwright.methods.adaqat.budget import meet_budget
from bitwright.methods.adaqat.rule import update

__all__ = ["AdaQAT", "meet_budget", "update"]
