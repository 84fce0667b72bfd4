"""Fake quantization for compilers: the reference's values, with gradients written out instead of derived.

Autograd's derivation of the reference divides five times per element, and keeps a float32 tensor of every gradient
that compiled code writes once and reads three times. Written out there is one division, and no such tensor.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels import reference
from bitwright.kernels.reference import EPS, along, random_mask

# DSQ's slope is a long formula of constants, which the reference has in double precision.
RULES = ("clipped_ste", "ste", "ewgs", "scalar", "constant")


def operator_name(*sources: bytes) -> str:
    """The name of an operator that these sources describe.

    torch's cache of compiled gradients on disk knows operators by their names alone: with a name that does not change
    with what is computed, an upgrade would train with the gradients of before.
    """
    return f"traced_fake_quantize_{hashlib.sha256(b''.join(sources)).hexdigest()[:12]}"


# An operator made of others, for compilers' first pass: reading the Function itself they instantiate its class, which
# torch deprecates with a warning. AOTAutograd looks inside both.
NAME = operator_name(Path(__file__).read_bytes(), Path(reference.__file__).read_bytes())
LIBRARY = torch.library.Library("bitwright", "FRAGMENT")
LIBRARY.define(
    f"{NAME}(Tensor x, Tensor scale, Tensor? zeros, Tensor lo, Tensor hi, Tensor? strength, Tensor? rate, "
    "Tensor? seed, float zero, int axis, int count, str rule, bool replaced_only) -> Tensor"
)


def codes(
    x: Tensor, scale: Tensor, zeros: Tensor | None, lo: Tensor, hi: Tensor, zero: float, axis: int, count: int
) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
    """(scale as it is used, zero, v, c): `v = x / scale + zero`, clipped to `c`; the operations of the reference."""
    s = along(scale.abs() + EPS if count else scale, x, axis)
    z = zero if zeros is None else along(zeros, x, axis)
    v = x / s
    v = v if zeros is None and zero == 0.0 else v + z
    return s, z, v, v.clamp(lo, hi)


def of_images(t: Tensor, axis: int) -> bool:
    """Whether channels lie in front of rows and columns, as in what convolutions over two axes read."""
    return t.ndim == 4 and axis % 4 == 1


def per_scale(t: Tensor, like: Tensor, axis: int) -> Tensor:
    """`t` summed over the elements that share a scale; the shape of `like`, (1,) or (channels,).

    One scale: in the order in which compilers sum what they fuse with it, so that both are one pass: images by channels
    first, as the sums of a norm's gradient are; all else at once, as gradients of tokens are one loop over elements.
    """
    if like.numel() == 1 and not of_images(t, axis):
        return t.sum().reshape(1)
    summed = t.sum([d for d in range(t.ndim) if d != axis % t.ndim]) if t.ndim > 1 else t
    return summed if like.numel() > 1 else summed.sum().reshape(1)


class Traced(torch.autograd.Function):
    """`reference.fake_quantize` under a `KernelRule` in `RULES`, differentiable once.

    Arguments: as of `bitwright::fake_quantize`, with the rule's name.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zeros: Tensor | None,
        lo: Tensor,
        hi: Tensor,
        strength: Tensor | None,
        rate: Tensor | None,
        seed: Tensor | None,
        zero: float,
        axis: int,
        count: int,
        rule: str,
        replaced_only: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zeros, lo, hi, strength, rate, seed)
        ctx.numbers = (zero, axis, count, rule, replaced_only)
        s, z, _, c = codes(x, scale, zeros, lo, hi, zero, axis, count)
        k = c.round()
        if rate is not None and seed is not None:
            k = torch.where(random_mask(x, rate, seed), k, c)
        y = k * s if zeros is None and zero == 0.0 else (k - z) * s
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, zeros, lo, hi, strength, rate, seed = ctx.saved_tensors
        zero, axis, count, rule, replaced_only = ctx.numbers
        s, z, v, c = codes(x, scale, zeros, lo, hi, zero, axis, count)
        g = g.to(v.dtype)
        r = k = c.round()
        if rate is not None:
            k = torch.where(random_mask(x, rate, seed), r, c)
        e = c - (k if replaced_only else r)
        if rule == "ewgs":
            gk = g + strength / (hi - lo) * g.abs() * e
        elif rule == "scalar":
            gk = g + strength / (hi - lo) * (g * s).abs().mean() / s * e
        elif rule == "constant":
            gk = g + strength / (hi - lo).square() / s * e
        else:
            gk = g
        inside = v == c
        gv = torch.where(inside, gk, 0.0)
        dx = (g if rule == "ste" else gv).to(x.dtype)
        # Both are the same number. Compilers keep what is read twice, `inside` or `gv`: bools are the least memory, but
        # CPU code converts them one by one, which costs images less than keeping `gv` would, and tokens more.
        clipped = torch.where(inside, gk * (c - z), 0.0) if of_images(x, axis) else gv * (c - z)
        ds = per_scale(g * (k - z) - clipped, scale, axis)
        if count:
            ds = ds * scale.sign() * (count * hi).rsqrt()
        dz = None if zeros is None else per_scale((gv - g) * s, zeros, axis)
        return (dx, ds, dz, *[None] * 10)


LIBRARY.impl(NAME, lambda *arguments: Traced.apply(*arguments), "CompositeImplicitAutograd")
traced_fake_quantize = getattr(torch.ops.bitwright, NAME).default
