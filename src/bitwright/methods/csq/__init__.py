"""CSQ: bi-level continuous sparsification quantization (arXiv 2212.02770)."""

from bitwright.methods.csq.csq import CSQ
from bitwright.methods.csq.planes import soft_codes

__all__ = ["CSQ", "soft_codes"]
