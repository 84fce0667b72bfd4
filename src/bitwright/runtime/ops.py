"""The operators of an integer network as data. Tensors are NHWC: uint8 codes or float32."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import BitwrightError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codes:
    """What a uint8 tensor can hold: codes lo to hi, 0 <= lo <= zero, hi <= 255, value (code - zero) * scale."""

    scale: float
    zero: int
    lo: int = 0
    hi: int = 255

    @property
    def span(self) -> tuple[int, int]:
        """Least and greatest code - zero, padding (0) included."""
        return min(self.lo - self.zero, 0), max(self.hi - self.zero, 0)


@dataclass(frozen=True)
class Quantize:
    """float32 to codes: clip(round_half_even(x / scale) + zero, lo, hi). planar: (N, C, H, W) comes in."""

    codes: Codes
    planar: bool = False

    def shape(self, x: Shape) -> Shape:
        return (x[0], x[2], x[3], x[1]) if self.planar else x


@dataclass(frozen=True)
class Dequantize:
    """Codes to float32: (code - zero) * scale."""

    codes: Codes

    def shape(self, x: Shape) -> Shape:
        return x


@dataclass(frozen=True, eq=False)
class Table:
    """Codes to codes by a table of 256."""

    table: NDArray[np.uint8]

    def shape(self, x: Shape) -> Shape:
        return x


@dataclass(frozen=True)
class Add:
    """clip(round_half_even((a - zero_a) * ratio_a + (b - zero_b) * ratio_b) + zero, lo, hi), each step in float32.

    A ratio is float32(input scale / output scale).
    """

    a: Codes
    b: Codes
    codes: Codes

    @property
    def ratios(self) -> tuple[np.float32, np.float32]:
        """What the two operands are multiplied by."""
        to = np.float32(self.codes.scale)
        return np.float32(self.a.scale) / to, np.float32(self.b.scale) / to

    def shape(self, a: Shape, b: Shape) -> Shape:
        return same(a, b)


@dataclass(frozen=True)
class AddFloat:
    """float32 a + b, then Relu where asked."""

    relu: bool = False

    def shape(self, a: Shape, b: Shape) -> Shape:
        return same(a, b)


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image. pads: top, left, bottom, right."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def meets_image(self) -> bool:
        """Whether every position covers a pixel, whatever the image."""
        (kh, kw), (top, left, bottom, right) = self.kernel, self.pads
        return self.dilations == (1, 1) and max(top, bottom) < kh and max(left, right) < kw

    def padded(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns with padding."""
        return h + self.pads[0] + self.pads[2], w + self.pads[1] + self.pads[3]

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns that come out; BitwrightError if none."""
        ends = zip(self.padded(h, w), self.kernel, self.strides, self.dilations, strict=True)
        rows, columns = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in ends)
        if rows < 1 or columns < 1:
            raise BitwrightError(f"an image of {h} x {w} is smaller than the kernel {self.kernel} with its padding")
        return rows, columns


@dataclass(frozen=True)
class MaxPool:
    """The greatest code or float under a window; padding never wins.

    The kernel must be larger than the padding and not dilated, so that a window is never all padding.
    """

    window: Window
    floats: bool = False

    def __post_init__(self) -> None:
        if not self.window.meets_image:
            raise BitwrightError("a pool with dilation, or padding of its kernel's size, is not accepted")

    def shape(self, x: Shape) -> Shape:
        return (x[0], *self.window.size(x[1], x[2]), x[3])


@dataclass(frozen=True)
class Mean:
    """Average over the image as float32, (N, 1, 1, C).

    Of codes: float32(sum of code - zero) * scale / pixels; of floats: the sum in order / pixels.
    """

    codes: Codes | None

    def shape(self, x: Shape) -> Shape:
        return (x[0], 1, 1, x[3])


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution of codes with an integer weight; a linear layer is one over 1 x 1 images.

    sums = Σ (x - zero) * weight + bias in int32. Codes come out where `codes` is given:
    clip(round_half_even(float32(sums) * multiplier) + codes.zero, codes.lo, codes.hi); else floats:
    float32(sums) * multiplier + late_bias, then Relu where asked.

    Attributes:
        weight: (out, in / groups, rows, columns) int8. bias: (out,) int32. multiplier, late_bias: (out,) float32.
        x: what the input holds. winograd: whether it may be used where it is exact.
    """

    name: str
    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    multiplier: NDArray[np.float32]
    x: Codes
    window: Window
    codes: Codes | None = None
    groups: int = 1
    late_bias: NDArray[np.float32] | None = None
    relu: bool = False
    winograd: bool = field(default=True)

    def __post_init__(self) -> None:
        if self.largest_sum >= 2**31:
            raise BitwrightError(f"{self.name}: its sums do not fit 32 bits")

    @property
    def largest_sum(self) -> int:
        """A bound of |sums|."""
        weights = np.abs(self.weight.astype(np.int64)).reshape(self.weight.shape[0], -1).sum(1)
        low, high = self.x.span
        return int((weights * max(-low, high) + np.abs(self.bias.astype(np.int64))).max())

    @property
    def depthwise(self) -> bool:
        """One channel in and one out per group."""
        return self.groups > 1 and self.weight.shape[:2] == (self.groups, 1)

    def shape(self, x: Shape) -> Shape:
        channels = self.weight.shape[1] * self.groups
        if len(x) == 4 and x[3] == channels:
            return (x[0], *self.window.size(x[1], x[2]), self.weight.shape[0])
        if x[-1] == channels and self.window == Window((1, 1)):
            return (*x[:-1], self.weight.shape[0])
        raise BitwrightError(f"{self.name}: has {channels} input channels and is given {x[-1]}")


@dataclass(frozen=True)
class View:
    """The same numbers in the same order in another shape; 0 keeps an axis, -1 is what is left."""

    to: Shape

    def shape(self, x: Shape) -> Shape:
        kept = tuple(x[i] if n == 0 and i < len(x) else n for i, n in enumerate(self.to))
        count = int(np.prod(x))
        known = int(np.prod([n for n in kept if n != -1]))
        full = tuple(count // max(known, 1) if n == -1 else n for n in kept)
        if int(np.prod(full)) != count:
            raise BitwrightError(f"a tensor of shape {x} does not reshape to {self.to}")
        return full


Op = Quantize | Dequantize | Table | Add | AddFloat | MaxPool | Mean | Conv | View


def same(a: Shape, b: Shape) -> Shape:
    """The common shape; BitwrightError where there is none."""
    if a != b:
        raise BitwrightError(f"tensors of shapes {a} and {b} are added; only equal shapes are accepted")
    return a


def gives_floats(op: Op) -> bool:
    """Whether float32 comes out; else codes, or for a `View` what came in."""
    if isinstance(op, Conv):
        return op.codes is None
    return isinstance(op, Dequantize | AddFloat | Mean) or (isinstance(op, MaxPool) and op.floats)
