"""Quantized convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.grids import Shape
from bitwright.kernels import keep_sources
from bitwright.layers.base import QuantLayer, apply
from bitwright.layers.whole import evaluates, exact_in_float, whole_input, whole_weight


class QuantConv1d(QuantLayer, nn.Conv1d):
    """`nn.Conv1d` on a quantized weight and input; groups and padding modes as in torch."""

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_channels if per_channel else 1, axis=-2)

    def forward(self, input: Tensor) -> Tensor:
        x, w = apply(self.input_quantizer, input), apply(self.weight_quantizer, self.weight)
        with keep_sources(x, w):
            return self._conv_forward(x, w, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` on a quantized weight and input; groups and padding modes as in torch."""

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_channels if per_channel else 1, axis=-3)

    def forward(self, input: Tensor) -> Tensor:
        x = apply(self.input_quantizer, input)
        if self.reproducible and not self.training and evaluates(x, self.weight):
            y = self.on_integers(x)
            if y is not None:
                return y
        w = apply(self.weight_quantizer, self.weight)
        with keep_sources(x, w):
            return self._conv_forward(x, w, self.bias)

    def on_integers(self, x: Tensor) -> Tensor | None:
        """The convolution of `x`, quantized already, rounded once; None where it is not one of integers."""
        left, right = whole_input(self.input_quantizer, x), whole_weight(self.weight_quantizer, self.weight)
        if left is None or right is None:
            return None
        column = lambda t: t.double().view(-1, 1, 1)  # noqa: E731
        fits = exact_in_float(left.numbers, right.numbers.flatten(1))
        numbers = (left.numbers, right.numbers) if fits else (left.numbers.double(), right.numbers.double())
        y = self._conv_forward(*numbers, None).double() * (left.scale.double() * column(right.scale))
        return (y if self.bias is None else y + column(self.bias)).float()


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after an axis so that the output has ceil(size / stride) positions (TensorFlow's "SAME")."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class QuantConv2dSame(QuantConv2d):
    """The quantized form of timm's `Conv2dSame`: input-size dependent padding as in TensorFlow."""

    def forward(self, input: Tensor) -> Tensor:
        x, w = apply(self.input_quantizer, input), apply(self.weight_quantizer, self.weight)
        rows = same_padding(x.shape[-2], self.kernel_size[0], self.stride[0], self.dilation[0])
        columns = same_padding(x.shape[-1], self.kernel_size[1], self.stride[1], self.dilation[1])
        x = F.pad(x, (*columns, *rows))
        return F.conv2d(x, w, self.bias, self.stride, (0, 0), self.dilation, self.groups)
