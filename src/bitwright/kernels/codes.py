"""Quantized tensors as integers, for readers that compute on these.

A reader asks (`asking`); what it quantizes then is a `Deferred` that has an integer per element, and a step.
`bitwright.kernels.integer` multiplies these; anybody else who looks gets float values.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bitwright.kernels.deferred import Deferred, Pending
from bitwright.kernels.reference import EPS

# What a type holds exactly.
RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


class Asked(threading.local):
    """What the readers of a thread ask for: a type and an offset."""

    wanted: tuple[torch.dtype, float] | None = None


ASKED = Asked()


class Form(NamedTuple):
    """How a tensor's codes become integers of a type: (code - zero) * times + offset.

    dtype: int8, uint8 or bfloat16. times: 1, or 2 where the value 0 lies half way between two codes. offset: 0, or 128
    for signed codes as uint8. poison: shape (1,), 0; kernels make it NaN where they meet one, which no byte can hold.
    """

    dtype: torch.dtype
    times: float
    offset: float
    poison: Tensor

    def call(self) -> tuple[float, float, Tensor, bool]:
        """What the kernels want to know: times, offset, poison, whether numbers are bfloat16."""
        return self.times, self.offset, self.poison, self.dtype == torch.bfloat16


class PendingCodes(Pending):
    """(number - offset) * step.

    numbers: int8, uint8 or bfloat16, dense. step: float32, (1,), or one per index of the first axis. All of it is NaN
    where a value was.
    """

    dtype = torch.float32

    def __init__(self, numbers: Tensor, offset: float, step: Tensor):
        self.offset, self.step = int(offset), step
        super().__init__(numbers)

    @property
    def numbers(self) -> Tensor:
        """The integers."""
        return self.x

    def compute(self) -> Tensor:
        with torch.no_grad():
            step = self.step if len(self.step) == 1 else self.step.view(-1, *[1] * (self.numbers.ndim - 1))
            return (self.numbers.float() - self.offset).mul_(step)

    def quantize(self, t: Deferred, *quantizer: object) -> Tensor | None:
        return None


@contextmanager
def asking(dtype: torch.dtype | None, offset: float = 0.0) -> Iterator[None]:
    """What is quantized in this context becomes integers of this type where that is possible; None: it does not.

    offset: what may be added to signed codes; 0: they have to fit by themselves.
    """
    before, ASKED.wanted = ASKED.wanted, None if dtype is None else (dtype, offset)
    try:
        yield
    finally:
        ASKED.wanted = before


def no_poison() -> Tensor:
    """Where a kernel puts a NaN, before it does."""
    return torch.zeros(1, dtype=torch.float32, device="cpu")


def as_number(zero: Tensor | float) -> float:
    """A zero point, (1,) if it is a tensor."""
    return zero.item() if isinstance(zero, Tensor) else zero


def times_of(zero: float) -> float:
    """What makes distances from the value 0, counted in codes, integers."""
    return 1.0 if zero == round(zero) else 2.0


def form_of(lo: Tensor, hi: Tensor, zero: Tensor | float, rate: Tensor | None) -> Form | None:
    """The integers that somebody asks for; None where nobody does or where codes do not fit.

    lo, hi: smallest and largest code, (1,). zero: the code of the value 0. rate: the share of quantized elements.
    """
    if ASKED.wanted is None or (rate is not None and rate.item() < 1.0):
        return None
    dtype, offset = ASKED.wanted
    zero = as_number(zero)
    times = times_of(zero)
    low, high = (lo.item() - zero) * times, (hi.item() - zero) * times
    offset = offset if low < 0 else 0.0
    least, most = RANGES[dtype]
    if low != round(low) or low + offset < least or high + offset > most:
        return None
    return Form(dtype, times, offset, no_poison())


def waiting(numbers: Tensor, form: Form | None, scale: Tensor, count: int) -> Tensor:
    """`numbers` as the quantized tensor that they stand for; without a form they are its values.

    scale, count: the quantizer's (`bitwright.kernels.reference.fake_quantize`).
    """
    if form is None:
        return numbers
    step = scale.detach()
    if count:
        step = step.abs() + EPS
    return Deferred(PendingCodes(numbers, form.offset, step / form.times + form.poison))


def held(t: Tensor) -> PendingCodes | None:
    """The numbers that `t` stands for, if nobody has looked at its values (and maybe changed them)."""
    found = t.pending if isinstance(t, Deferred) else None
    return found if isinstance(found, PendingCodes) and found.value is None else None
