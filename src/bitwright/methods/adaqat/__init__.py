"""AdaQAT: adaptive bit-width quantization-aware training (arXiv 2404.16876), in part reconstructed."""

from bitwright.methods.adaqat.adaqat import AdaQAT
from bitwright.methods.adaqat.rule import update

__all__ = ["AdaQAT", "update"]
