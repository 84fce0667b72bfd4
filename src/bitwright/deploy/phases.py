"""A transposed convolution in the frozen form: a plain one of stride 1, whose channels are then laid out as pixels.

Output pixel stride * m + r reads the pixels m - j of the input through the taps stride * j + r of the weight. So the
pixels with the same r, a phase, are the output of a convolution of ceil(kernel / stride) taps; all phases together are
one convolution with stride times as many channels per axis. Runtimes have integer kernels for it, and none for a
transposed one; nor are there zeros between pixels to multiply with. Its weight is made of the stored one at load.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.deploy.integer import IntConv, IntLayer
from bitwright.layers.fold import Weight
from bitwright.layers.transposed import QuantConvTranspose, outputs_first


def taps_of(kernel: int, stride: int, dilation: int) -> int:
    """Taps of every phase along one axis."""
    return math.ceil((dilation * (kernel - 1) + 1) / stride)


def phases(numbers: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """The weight (out, in / groups, kernel, ...) as (out * strides, in / groups, taps, ...), phases side by side."""
    axes = len(stride)
    for axis, (s, d) in enumerate(zip(stride, dilation, strict=True), 2):
        kernel = numbers.shape[axis]
        taps = taps_of(kernel, s, d)
        wide = numbers.new_zeros(*numbers.shape[:axis], s * taps, *numbers.shape[axis + 1 :])
        wide.narrow(axis, 0, d * (kernel - 1) + 1).movedim(axis, 0)[::d] = numbers.movedim(axis, 0)
        numbers = wide
    for axis, s in zip(range(2, 2 + 2 * axes, 2), stride, strict=True):
        numbers = numbers.unflatten(axis, (-1, s)).flip(axis)
    within, taps = range(3, 3 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
    return numbers.permute(0, *within, 1, *taps).flatten(0, axes)


def numbers_of(weight: Weight | Tensor) -> Tensor:
    """The integers of a quantized weight; a float one itself."""
    return weight if isinstance(weight, Tensor) else weight.numbers


class PhaseConv(IntConv):
    """The convolution that gives all phases.

    Args:
        source: the transposed convolution. weight, bias, bias_codes: of the transposed convolution, output channels
            first; a channel's scale and bias are those of all its phases.

    Attributes:
        taps: the weight as it was given, which is what files hold. steps, dilations: stride and dilation of `source`.
        output_padding: rows and columns at the end of the output that the kernel may not reach.
    """

    def __init__(
        self,
        source: QuantConvTranspose,
        *,
        weight: Weight | Tensor,
        bias: Tensor | None,
        bias_codes: Tensor | None = None,
        **fields: Any,
    ):
        stride, dilation = source.stride, source.dilation
        count = math.prod(stride)

        def spread(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.repeat_interleave(count)

        if isinstance(weight, Tensor):
            made: Weight | Tensor = phases(weight, stride, dilation)
        else:
            scale = weight.scale if weight.scale.numel() == 1 else weight.scale.repeat_interleave(count)
            made = replace(weight, numbers=phases(weight.numbers, stride, dilation), scale=scale)
        shape = numbers_of(made).shape
        one = (1,) * len(stride)
        like: Any = SimpleNamespace(
            **{"stride": one, "dilation": one, "groups": source.groups, "kernel_size": tuple(shape[2:])},
            **{"padding_mode": "zeros", "_reversed_padding_repeated_twice": ()},
        )
        super().__init__(like, same=False, weight=made, bias=spread(bias), bias_codes=spread(bias_codes), **fields)
        self.taps, self.steps, self.dilations = weight, stride, dilation
        self.reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, source.kernel_size, strict=True))
        self.cut, self.output_padding = source.padding, source.output_padding

    def stored(self) -> IntLayer:
        """The transposed convolution's numbers in its own layout, (in, out / groups, kernel, ...), for files."""
        count = math.prod(self.steps)
        turned = outputs_first(numbers_of(self.taps), self.groups)
        weight = turned if isinstance(self.taps, Tensor) else replace(self.taps, numbers=turned)
        bias, codes = (None if t is None else t[::count] for t in (self.bias, self.bias_codes))
        return IntLayer(self.name, weight, bias, codes, self.input_quantizer)

    def spread(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the transposed convolution, in its own layout, as this one has them."""
        found = phases(outputs_first(weight, self.groups), self.steps, self.dilations)
        return found, None if bias is None else bias.repeat_interleave(math.prod(self.steps))

    def first(self, axis: int) -> int:
        """The pixel of the input from which the output's first rows come, along one axis."""
        return min(self.cut[axis] // self.steps[axis], self.kernel_size[axis] - 1)

    def length(self, axis: int, size: int) -> int:
        """Of the transposed convolution's output along one axis, of `size` pixels."""
        return (size - 1) * self.steps[axis] - 2 * self.cut[axis] + self.reach[axis] + self.output_padding[axis]

    def pads(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        ends = []
        for axis, size in enumerate(sizes):
            last = math.ceil((self.cut[axis] + self.length(axis, size)) / self.steps[axis])
            ends += [(self.kernel_size[axis] - 1 - self.first(axis), max(last - size, 0))]
        return tuple(n for pair in reversed(ends) for n in pair)


class IntConvTranspose(nn.Module):
    """The convolution of all phases, and the place of each in the output."""

    _output_padding = nn.modules.conv._ConvTransposeNd._output_padding  # asks for nothing but `output_padding`

    def __init__(self, source: QuantConvTranspose, convolution: Any):
        super().__init__()
        self.about = (source.stride, source.padding, source.kernel_size, len(source.kernel_size), source.dilation)
        self.output_padding = source.output_padding
        self.convolution: PhaseConv = convolution

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, ...) float to (N, C_out, ...), the dtype of `x`."""
        inner = self.convolution
        inner.output_padding = tuple(self._output_padding(x, output_size, *self.about))  # pyright: ignore
        y = interleaved(inner(x), inner.steps)
        for axis, size in enumerate(x.shape[2:]):
            start = inner.cut[axis] - inner.steps[axis] * inner.first(axis)
            length = inner.length(axis, size)
            if (start, length) != (0, y.shape[2 + axis]):
                y = y.narrow(2 + axis, start, length)
        return y


def interleaved(y: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(N, out * strides, ...) as (N, out, ...) with `stride` times as many pixels along each axis."""
    if set(stride) == {1}:
        return y
    if len(stride) == 2 and stride[0] == stride[1]:
        return F.pixel_shuffle(y, stride[0])
    axes, sizes = len(stride), y.shape[2:]
    y = y.reshape(-1, y.shape[1] // math.prod(stride), *stride, *sizes)
    order = [a for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for a in pair]
    return y.permute(0, 1, *order).reshape(-1, y.shape[1], *(n * s for n, s in zip(sizes, stride, strict=True)))
