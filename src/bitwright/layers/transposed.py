"""Quantized transposed convolutions.

Their weight is (in, out / groups, ...): output channels lie along axis 1, and so do the scales. In groups, channels of
equal index share a scale, as in torch's and ONNX's own quantized forms. Deployment has the output channels first.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.grids import Shape
from bitwright.layers.conv import QuantConv


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """(in, out / groups, ...) as (out, in / groups, ...), the layout of a convolution's weight."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class QuantConvTranspose(QuantConv):
    """What quantized transposed convolutions share; `output_size` as in torch."""

    _output_padding: Any
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    in_channels: int

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        about = (self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        extra = self._output_padding(input, output_size, *about)
        transpose: Any = TRANSPOSES[len(self.kernel_size)]

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return transpose(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)

        return self.convolved(input, convolve)

    def weight_shape(self, slot: str, per_channel: bool) -> Shape:
        """As in every layer, but along axis 1."""
        weight = self.weight_of(slot)
        return Shape("weight", channels=weight.shape[1] if per_channel else 1, axis=1, numel=weight.numel())

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_channels if per_channel else 1, axis=-1 - len(self.kernel_size))

    def outputs_first(self, weight: Tensor) -> Tensor:
        return outputs_first(weight, self.groups)

    def output_scales(self, scale: Tensor) -> Tensor:
        return scale if scale.numel() == 1 else scale.repeat(self.groups)


class QuantConvTranspose1d(QuantConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on a quantized weight and input."""


class QuantConvTranspose2d(QuantConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on a quantized weight and input."""


class QuantConvTranspose3d(QuantConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on a quantized weight and input."""
