"""Numbers per channel in as few bits as hold them: a stream of bits beside a handful of whole numbers; lossless.

Scales and biases are rounded to few significant bits before the last evaluation (`bitwright.layers.significant`). Here
they are only looked at: numbers that are not short come back as None and are stored in float32.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A wider code is no gain over what it replaces, and decoders add its bits up in int32.
WIDEST = 24
# Decoders know 2^-k for k below this.
POWERS = 64


@dataclass(frozen=True, eq=False)
class Stream:
    """Unsigned codes (n,), int64. about: n, bits of a code, then what makes numbers of codes, see `whole`."""

    codes: NDArray[np.int64]
    about: tuple[int, ...]

    @property
    def packed(self) -> NDArray[np.uint8]:
        """The codes one after the other, from the lowest bit upwards."""
        bits = (self.codes[:, None] >> np.arange(self.about[1])) & 1
        return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")

    @property
    def nbytes(self) -> int:
        """Bytes of `packed`."""
        return -(-self.about[0] * self.about[1] // 8)


def stream(codes: NDArray[np.int64], *about: int) -> Stream | None:
    """`codes` (n,), not negative, at their least width; None where that is more than `WIDEST` bits."""
    width = max(int(codes.max()).bit_length(), 1)
    return Stream(codes, (codes.size, width, *about)) if width <= WIDEST else None


def whole(numbers: NDArray[np.int64]) -> Stream | None:
    """Integers (n,). about: count, width, shift; number = code - shift."""
    shift = max(-int(numbers.min()), 0)
    return stream(numbers + shift, shift)


def fixed(values: NDArray[np.float32]) -> Stream | None:
    """Multiples (n,) of one power of two. about: count, width, shift, k; value = (code - shift) * 2^-k."""
    if not np.isfinite(values).all():
        return None
    mantissa, exponent = np.frexp(values.astype(np.float64))
    digits = np.ldexp(mantissa, 24).astype(np.int64)
    lowest = np.where(digits == 0, 0, exponent - 24 + trailing_zeros(digits))
    k = -min(int(lowest.min()), 0)
    numbers = np.ldexp(values.astype(np.float64), k)
    if k >= POWERS or np.abs(numbers).max() >= 2**WIDEST:
        return None
    made = whole(numbers.astype(np.int64))
    return None if made is None else Stream(made.codes, (*made.about, k))


def floating(values: NDArray[np.float32]) -> Stream | None:
    """Numbers (n,) of few significant bits, none of them 0. about: count, width, signs, mantissas, first, k.

    code = signs * place + (value < 0), with signs = 2 if there are negative ones, else 1. Numbers with m bits behind
    the leading one have mantissas = 2^m places an octave: with p = place + first,
    |value| = (mantissas + p % mantissas) * 2^(p // mantissas - k). They lie as in float32's own bit patterns.
    """
    pattern = np.abs(values).view(np.int32).astype(np.int64)
    if not np.isfinite(values).all() or not pattern.all():
        return None
    spare = min(int(trailing_zeros(pattern).min()), 23)
    places, m = pattern >> spare, 23 - spare
    octave = int(places.min()) >> m
    last = (int(places.max()) >> m) - octave
    k = 127 + m - octave
    if not last <= k < POWERS:
        return None
    signs = 1 + int((values < 0).any())
    codes = (places - places.min()) * signs + (values < 0)
    return stream(codes, signs, 1 << m, int(places.min()) - (octave << m), k)


def trailing_zeros(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many times 2 divides each number; 63 for 0."""
    lowest = numbers & -numbers
    return np.where(numbers == 0, 63, np.frexp(lowest.astype(np.float64))[1] - 1).astype(np.int64)


def shortest(values: NDArray[np.float32]) -> tuple[str, Stream] | None:
    """("floating" or "fixed", the stream that takes fewer bits), or None where there is none."""
    found = [(kind, made) for kind, made in (("floating", floating(values)), ("fixed", fixed(values))) if made]
    return min(found, key=lambda pair: pair[1].nbytes, default=None)
