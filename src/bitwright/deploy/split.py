"""A strided convolution over few channels as a plain one over blocks of pixels: the same sums, on a faster kernel.

Integer kernels gather the pixels under a window channel by channel, and with three channels the gathering takes longer
than the sums: a network's first convolution is then its slowest. Blocks of stride × stride pixels are moved into the
channels (SpaceToDepth), taps to where their pixels went, and a stride of 1 remains.
"""

import math
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from bitwright.deploy.integer import IntConv
from bitwright.deploy.lower import Lowering

FEW_CHANNELS = 4
# Pixels times channels in a row of the window, from which on gathering is fast as it is: the 16 × 16 patches of a
# vision transformer take 1.4 times as long over blocks, 4 × 4 ones and MobileNet's first layer 0.7 times
# (`benchmarks/speed/split.csv`).
LONG_ROW = 32
SPLIT = ".split_weight"  # what the dequantized weight of such a layer is called, behind the layer's name


@dataclass(frozen=True)
class Axis:
    """One axis of the convolution over blocks: taps before and after the weight, blocks of the window, pads."""

    before: int
    after: int
    taps: int
    pads: tuple[int, int]


def split_axis(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> Axis | None:
    """What becomes of one axis; None where its size is no whole number of blocks, or pixels at its end are not read.

    Tap t of output i reads pixel stride · i − pads[0] + t. With `first` the block of its first tap at i = 0, the same
    pixel is number (t + before) of the window that starts at that block.
    """
    if size % stride:
        return None
    first = -math.ceil(pads[0] / stride)
    before = -pads[0] - stride * first
    taps = math.ceil((before + kernel) / stride)
    out = (size + sum(pads) - kernel) // stride + 1
    end = out - 1 + taps + first - size // stride
    return None if end < 0 else Axis(before, stride * taps - before - kernel, taps, (-first, end))


class SplitLowering(Lowering):
    """`Lowering` that writes such convolutions over blocks, where their input is quantized per tensor."""

    def conv(self, layer: IntConv, at: str, x: str, y: str, pads: list[int], sizes: list[int]) -> None:
        axes = self.split_axes(layer, pads, sizes)
        if axes is None:
            return super().conv(layer, at, x, y, pads, sizes)
        assert layer.input_quantizer is not None
        stride = layer.stride[0]
        x = self.quantized(layer.input_quantizer, x)
        of_codes = self.nodes[-1]  # the DequantizeLinear: it comes behind the blocks
        del self.nodes[-1]
        blocks = self.node("SpaceToDepth", [of_codes.input[0]], f"{at}.blocks", blocksize=stride)
        self.node("DequantizeLinear", [blocks, *of_codes.input[1:]], x)
        inputs = [x, self.split_weight(layer, axes)]
        self.finish(layer, at, inputs, y, {"pads": [a.pads[i] for i in (0, 1) for a in axes]})

    def split_axes(self, layer: IntConv, pads: list[int], sizes: list[int]) -> list[Axis] | None:
        """Both axes, or None where the layer stays as it is."""
        codes = layer.input_quantizer
        fits = layer.integer and codes is not None and not codes.shared
        square = len(sizes) == 2 and layer.stride[0] == layer.stride[1] > 1 and set(layer.dilation) == {1}
        channels = layer.numbers.shape[1]
        few = layer.groups == 1 and channels <= FEW_CHANNELS and channels * layer.kernel_size[-1] < LONG_ROW
        if not (fits and square and few) or (any(pads) and layer.padding_mode != "zeros"):
            return None
        ends = zip(pads[:2], pads[2:], strict=True)
        found = [split_axis(*n) for n in zip(sizes, layer.kernel_size, layer.stride, ends, strict=True)]
        whole = [a for a in found if a is not None]
        return whole if len(whole) == 2 else None

    def split_weight(self, layer: IntConv, axes: list[Axis]) -> str:
        """Codes (out, in, rows, columns) as (out, stride * stride * in, blocks, blocks), dequantized at load."""
        name, stride = layer.name, layer.stride[0]
        out = f"{name}{SPLIT}"
        if name in self.files:
            return out
        codes = self.unpacked(layer, False)
        rows, columns = axes
        around = [0, 0, rows.before, columns.before, 0, 0, rows.after, columns.after]
        shape = [*layer.numbers.shape[:2], rows.taps, stride, columns.taps, stride]
        whole = [shape[0], shape[1] * stride * stride, rows.taps, columns.taps]
        numbers = lambda what, v: self.constant(f"{name}.split_{what}", np.array(v, np.int64))  # noqa: E731
        w = self.node("Pad", [codes, numbers("pads", around)], f"{name}.split_padded") if any(around) else codes
        w = self.node("Reshape", [w, numbers("shape", shape)], f"{name}.split_taps")
        w = self.node("Transpose", [w], f"{name}.split_turned", perm=[0, 3, 5, 1, 2, 4])
        w = self.node("Reshape", [w, numbers("whole", whole)], f"{name}.split_codes")
        per_axis = {"axis": 0} if layer.packed is not None and layer.packed.scale.numel() > 1 else {}
        return self.node("DequantizeLinear", [w, self.weight_scale(layer)], out, **per_axis)


def unsplit(node: NodeProto, name: str) -> NodeProto:
    """The node that dequantizes a split layer's weight in its own shape; `node`: the one in the file."""
    per_axis = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return helper.make_node("DequantizeLinear", [f"{name}.codes", node.input[1]], [f"{name}.weight"], **per_axis)
