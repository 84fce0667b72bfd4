"""SEQ: at 2 bits, weights with as many values below 0 as above (ParetoQ, Liu et al., 2025, arXiv 2502.02631)."""

from bitwright.grids.base import CodeRange
from bitwright.grids.lsq import LSQ

# ParetoQ takes the balanced values at 2 bits and LSQ's at 3 and 4.
BALANCED = 2


class SEQ(LSQ):
    """LSQ, but 2-bit weights take the values -1.5, -0.5, 0.5 and 1.5 times the scale instead of -2, -1, 0 and 1.

    Two's complement has one value more below 0 than above: at 2 bits a quarter of all codes. For normally
    distributed weights the balanced values have the least squared error of any four at equal distances, 0.119 of the
    variance, a fifth less than two's complement (0.149). One value more or less matters little at 3 bits and more,
    where a code for 0 is worth having (pruned and padded weights), and there this grid is LSQ, as it is for inputs
    and, at 1 bit, whose two values are balanced in LSQ already.

    The source trains the clipping bound 2 * scale and lets the weight's gradient pass up to it, half a step beyond the
    outermost value; it has linear layers in mind, with inputs in full precision (stated, in its public code). Here
    the scale is learned, and its gradient and the end of the weight's are LSQ's. That, and the use for convolutions
    and beside quantized inputs, is our choice.
    """

    def code_range(self, bits: int, signed: bool) -> CodeRange:
        codes = super().code_range(bits, signed)
        return codes._replace(zero=-0.5) if bits == BALANCED and signed else codes
