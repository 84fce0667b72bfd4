"""AdaQAT's arithmetic: one real-valued bit-width, its gradient, its oscillations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bitwright.quantizer import Quantizer
from bitwright.spec import MAX_BITS


def bits_of(real: float) -> int:
    """ceil(N): the bits of every quantized operation, forward and backward."""
    return math.ceil(real)


def bit_gradient(loss: float, probe: float, lam: float, other_bits: float) -> float:
    """dL/dN ~ [L(b) - L(b - 1)] + lambda * (bits of the other operand), b = ceil(N).

    The second term is the difference of lambda * b_w * b_a, which is proportional to BitOPs.
    """
    return (loss - probe) + lam * other_bits


def update(N: float, loss: float, probe: float, lam: float, other_bits: float, eta: float) -> float:
    """N - eta dL/dN: a bit goes while it lowers the loss by less than lambda times what it costs.

    Args:
        N: real-valued bit-width. loss, probe: task loss at ceil(N) and at ceil(N) - 1 bits.
        lam: weight of the hardware loss, in units of the task loss. other_bits: what one bit costs.
        eta: step.
    """
    return N - eta * bit_gradient(loss, probe, lam, other_bits)


def relative_update(N: float, gain: float, slope: float, eta: float) -> float:
    """`update` divided by the cost's part of the gradient, at most `eta` bits either way (ours, for budgets).

    The multiplier of a budget varies over orders of magnitude; so do layers' shares. Divided, a bit that no loss
    defends goes at `eta` bits a visit, whatever the units.

    Args:
        gain: L(b - 1) - L(b), what the last bit is worth. slope: lambda times the cost of one bit, > 0.
    """
    return N - eta * min(max(1.0 - gain / slope, -1.0), 1.0)


@dataclass
class Width:
    """One learned bit-width and the quantizers that have it.

    Attributes:
        real: N. frozen: whether it still moves. arrivals: upward moves to each number of bits, so far.
        fit_xy, fit_xx: moments of the fit `loss(p) - loss(b) = a (4^-p - 4^-b)` (see `curvatures`).
    """

    name: str
    role: str
    quantizers: list[Quantizer]
    real: float
    frozen: bool = False
    arrivals: dict[int, int] = field(default_factory=dict)
    fit_xy: float = 0.0
    fit_xx: float = 0.0

    @property
    def bits(self) -> int:
        """ceil(N)."""
        return bits_of(self.real)

    def apply(self) -> None:
        """Give the quantizers their bits where they have others; scales follow."""
        for quantizer in self.quantizers:
            if int(quantizer.bits.item()) != self.bits:
                quantizer.set_bits(self.bits)

    def freeze(self, bits: int) -> None:
        """Stop at `bits`; N becomes that integer."""
        self.real, self.frozen = float(bits), True

    def move(self, real: float, floor: int, freeze_after: int | None) -> None:
        """Take a new N, clamped to [floor - 0.5, 8], and freeze where it has converged.

        The `freeze_after + 1`-th upward move to the same number of bits freezes there, at that integer; so does
        reaching floor - 0.5, at the floor. None: neither does.
        """
        before = self.bits
        self.real = min(max(real, floor - 0.5), float(MAX_BITS))
        if freeze_after is None:
            return
        if self.bits > before:
            self.arrivals[self.bits] = self.arrivals.get(self.bits, 0) + 1
            if self.arrivals[self.bits] > freeze_after:
                self.freeze(self.bits)
        if self.real <= floor - 0.5:
            self.freeze(floor)

    def observe(self, loss: float, probe: float, probe_bits: int, forget: float = 0.9) -> None:
        """Take in what `probe_bits` instead of the present bits cost now; older observations fade by `forget`."""
        x = 4.0**-probe_bits - 4.0**-self.bits
        self.fit_xy = forget * self.fit_xy + (probe - loss) * x
        self.fit_xx = forget * self.fit_xx + x * x


def curvatures(widths: Sequence[Width], floor: int, prior: float = 4.0) -> list[float]:
    """a of every width in loss(b) = const + a 4^-b: rounding noise has the power 4^-b (ours).

    Least squares over a width's observations and `prior` more, of probes at `floor` bits that agree with the fit over
    all widths of its role: a mini-batch says little about one layer. At least a thousandth of the mean.
    """
    found = []
    for width in widths:
        alike = [w for w in widths if w.role == width.role]
        seen = sum(w.fit_xx for w in alike)
        common = max(sum(w.fit_xy for w in alike) / seen, 0.0) if seen > 0 else 1.0
        weight = prior * 16.0**-floor
        found.append((width.fit_xy + weight * common) / (width.fit_xx + weight))
    mean = sum(max(a, 0.0) for a in found) / len(found)
    return [max(a, 1e-3 * mean if mean > 0 else 1.0) for a in found]
