"""Quantized convolutions."""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.grids import Shape
from bitwright.kernels import integer, keep_sources
from bitwright.kernels.codes import held
from bitwright.layers.base import QuantLayer, apply, quantize_to_bytes
from bitwright.layers.sums import Sums
from bitwright.layers.whole import evaluates, exact_in_float, whole_input, whole_weight

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of input, weight and bias


class QuantConv(QuantLayer):
    """What quantized convolutions share; groups and padding modes as in torch."""

    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.convolved(input, self._conv_forward)

    def convolved(self, input: Tensor, convolve: Convolve) -> Tensor:
        """`convolve(input, weight, bias)` of quantized operands."""
        if self.training and self.may_multiply(input):
            x, w = quantize_to_bytes(self.input_quantizer, input, self.weight_quantizer, self.weight)
            if held(x) and held(w):
                return integer.convolution(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)
            with keep_sources(x, w):
                return convolve(x, w, self.bias)
        x = apply(self.input_quantizer, input)
        if self.reproducible and not self.training and evaluates(x, self.weight, self.bias):
            sums = self.sums(x, convolve)
            if sums is not None:
                return sums.noted()
        w = apply(self.weight_quantizer, self.weight)
        with keep_sources(x, w):
            return convolve(x, w, self.bias)

    def may_multiply(self, input: Tensor) -> bool:
        """Whether it is worth a try to multiply integers (`bitwright.kernels.integer`)."""
        return False

    def sums(self, x: Tensor, convolve: Convolve) -> Sums | None:
        """The exact sums of the convolution of `x`, quantized already; None where it is not one of integers."""
        left, found = whole_input(self.input_quantizer, x), whole_weight(self.weight_quantizer, self.weight)
        axes = self.weight.ndim
        if left is None or found is None or x.ndim != axes:
            return None
        right = self.arranged(found)
        numbers = (left.numbers, found.numbers.float())
        if not exact_in_float(left.numbers, right.numbers.float().flatten(1)):
            numbers = (numbers[0].double(), numbers[1].double())
        sums = convolve(*numbers, None)
        return Sums(sums, right, self.bias, left.scale, left.reach, axes - 2, axes, True)


class QuantConv1d(QuantConv, nn.Conv1d):
    """`nn.Conv1d` on a quantized weight and input."""

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_channels if per_channel else 1, axis=-2)


class QuantConv2d(QuantConv, nn.Conv2d):
    """`nn.Conv2d` on a quantized weight and input."""

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_channels if per_channel else 1, axis=-3)

    def may_multiply(self, input: Tensor) -> bool:
        plain = type(self)._conv_forward is nn.Conv2d._conv_forward
        if not plain or self.padding_mode != "zeros" or isinstance(self.padding, str) or input.ndim != 4:
            return False
        if self.groups > 1 or not integer.trusts(input, self.kernel_size, self.stride, self.padding, self.dilation):
            return False
        pixels = input.numel() // (self.in_channels * math.prod(self.stride))
        work = pixels * self.weight.numel()
        last = integer.gives_channels_last(input, self.weight)
        if not last and work < integer.DENSEST * (input.numel() + pixels * self.out_channels):
            return False
        return integer.may_multiply(input, self.weight, work)


class QuantConv3d(QuantConv, nn.Conv3d):
    """`nn.Conv3d` on a quantized weight and input."""

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_channels if per_channel else 1, axis=-4)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after an axis so that the output has ceil(size / stride) positions (TensorFlow's "SAME")."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class QuantConv2dSame(QuantConv2d):
    """The quantized form of timm's `Conv2dSame`: input-size dependent padding as in TensorFlow."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = same_padding(input.shape[-2], self.kernel_size[0], self.stride[0], self.dilation[0])
        columns = same_padding(input.shape[-1], self.kernel_size[1], self.stride[1], self.dilation[1])
        x = F.pad(input, (*columns, *rows))
        return F.conv2d(x, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
