"""Quantized transposed convolutions against torch's own function on quantized tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.layers import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from bitwright.methods.csq.planes import BitPlanes
from bitwright.rules import Rule


def rounded(weight, scale, groups):
    """The weight (in, out / groups, ...) on a 4-bit grid, one scale per channel of axis 1."""
    s = scale.view(1, -1, *[1] * (weight.ndim - 2))
    return (weight / s).round().clamp(-8, 7) * s


@pytest.mark.parametrize(("groups", "stride", "dilation", "extra"), [(1, 2, 1, 1), (2, 2, 1, 0), (3, 1, 2, 0)])
def test_2d_has_a_scale_per_output_channel_of_a_group(groups, stride, dilation, extra):
    layer = nn.ConvTranspose2d(6, 12, 3, stride, (1, 0), extra, groups, True, dilation)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(2, 6, 5, 7)
    bw.calibrate(bw.prepare(layer, bw.rules("w4a4", ends=None)), [x])
    assert type(layer) is QuantConvTranspose2d
    s, a = layer.weight_quantizer.grid.scale.detach(), layer.input_quantizer.grid.scale.detach()
    assert s.shape == (12 // groups,)
    w, xq = rounded(weight, s, groups), (x / a).round().clamp(-8, 7) * a
    expected = F.conv_transpose2d(xq, w, bias, stride, (1, 0), extra, groups, dilation)
    torch.testing.assert_close(layer(x), expected)


def test_3d():
    layer = nn.ConvTranspose3d(4, 6, (1, 2, 3), (1, 2, 2), (0, 0, 1), (0, 0, 1), groups=2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(2, 4, 3, 4, 5)
    bw.calibrate(bw.prepare(layer, bw.rules("w4a4", ends=None)), [x])
    assert type(layer) is QuantConvTranspose3d
    s, a = layer.weight_quantizer.grid.scale.detach(), layer.input_quantizer.grid.scale.detach()
    w, xq = rounded(weight, s, 2), (x / a).round().clamp(-8, 7) * a
    torch.testing.assert_close(layer(x), F.conv_transpose3d(xq, w, bias, (1, 2, 2), (0, 0, 1), (0, 0, 1), 2))


def test_the_scales_start_from_each_output_channel_and_learn():
    layer = nn.ConvTranspose2d(4, 3, 2, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1))
    x = torch.rand(2, 4, 5, 5)
    bw.calibrate(bw.prepare(layer, bw.rules("w4a4", ends=None)), [x])
    s = layer.weight_quantizer.grid.scale
    mean = layer.weight.detach().abs().movedim(1, 0).flatten(1).mean(1)
    torch.testing.assert_close(s.detach(), 2 * mean / 7**0.5)
    layer(x).square().sum().backward()
    assert (s.grad != 0).all()
    assert layer.weight.grad.abs().sum() > 0


def test_output_size_as_in_torch():
    layer = nn.ConvTranspose2d(3, 2, 3, 2, 1)
    x, twin = torch.rand(1, 3, 5, 5), copy.deepcopy(layer)
    bw.calibrate(bw.prepare(layer, bw.rules("w8a8")), [x])
    for size in ([9, 9], [10, 9], [10, 10]):
        assert layer(x, output_size=size).shape[2:] == tuple(size)
        torch.testing.assert_close(layer(x, output_size=size), twin(x, output_size=size), atol=0.05, rtol=0)


def test_1d_and_one_scale_for_all():
    layer, x = nn.ConvTranspose1d(4, 6, 4, 2, 1, groups=2), torch.rand(2, 4, 9)
    spec = bw.QuantizerSpec(bits=4, per_channel=False)
    bw.calibrate(
        bw.prepare(layer, [Rule(match="*", weight=spec, input=bw.QuantizerSpec(bits=4, per_channel=True))]), [x]
    )
    assert type(layer) is QuantConvTranspose1d
    assert layer.weight_quantizer.grid.scale.shape == (1,)
    a = layer.input_quantizer.grid.scale.detach()
    assert a.shape == (4,)
    a = a.view(4, 1)
    w, xq = rounded(layer.weight.detach(), layer.weight_quantizer.grid.scale.detach(), 1), (x / a).round().clamp(0, 15)
    torch.testing.assert_close(layer(x), F.conv_transpose1d(xq * a, w, layer.bias, 2, 1, groups=2))


@pytest.mark.parametrize("grid", ["lsq", "lsq+", "pact", "dorefa", "sat", "minmax", "tqt"])
def test_every_grid_gives_values_of_its_own_codes(grid):
    layer = nn.ConvTranspose2d(4, 3, 3, 2)
    x = torch.rand(2, 4, 5, 5)
    spec = bw.QuantizerSpec(bits=4, grid=grid)
    bw.calibrate(bw.prepare(layer, [Rule(match="*", weight=spec)]), [x])
    quantizer = layer.weight_quantizer.eval()
    affine = quantizer.affine(layer.weight)
    scale = affine.scale if affine.scale.numel() == 1 else affine.scale.view(1, -1, 1, 1)
    values = (quantizer.integer_codes(layer.weight) - affine.zero) * scale
    torch.testing.assert_close(quantizer(layer.weight), values)


def test_first_and_last_are_transposed_convolutions_too():
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 2, 2))
    bw.prepare(model, bw.rules("w4a4"))
    assert [int(m.weight_quantizer.bits) for m in model] == [8, 4, 8]


def test_bit_planes_start_at_the_weight_of_each_output_channel():
    layer = nn.ConvTranspose2d(4, 3, 2, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1))
    before = layer.weight.detach().clone()
    bw.calibrate(bw.prepare(layer, [Rule(match="*", weight=bw.QuantizerSpec(bits=8))]), [torch.rand(2, 4, 5, 5)])
    planes = BitPlanes("", layer.weight_quantizer, layer.weight, torch.full((1,), 1.0), 1.0)
    planes.write()
    error = (layer.weight - before).abs().amax((0, 2, 3)) / before.abs().amax((0, 2, 3))
    assert error.max() < 1 / 127
