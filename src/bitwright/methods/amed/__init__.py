"""AMED: bit-widths as a Markov chain, scored by the loss and the cost (arXiv 2205.15437)."""

from bitwright.methods.amed.amed import AMED

__all__ = ["AMED"]
