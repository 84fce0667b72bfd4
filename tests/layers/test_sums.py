"""Norms behind reproducible layers: when they scale the sums themselves, and when they are norms as ever."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.layers.sums import normed


@pytest.fixture
def pair():
    """(a reproducible convolution, the norm behind it, images)."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)), torch.randn(16, 8, 9, 9)
    for _ in range(3):
        model(x)
    bw.prepare(model.eval(), bw.rules("w3a3"))
    bw.make_reproducible(bw.calibrate(model, [x]).eval())
    return model[0], model[1], x


def plain(norm: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """What a norm makes of numbers of unknown origin."""
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)  # type: ignore


@torch.no_grad()
def test_a_norm_scales_the_sums_behind_it(pair):
    conv, norm, x = pair
    y = conv(x)
    assert torch.equal(norm(y), normed(norm, y))
    assert not torch.equal(norm(y), plain(norm, y))
    # The bias moves to the grid of the sums: half a step of it at most, as on integer kernels.
    step = conv.input_quantizer.affine().scale * conv.weight_quantizer.affine(conv.weight).scale
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    off = (norm(y) - plain(norm, y)).abs().amax((0, 2, 3))
    assert (off <= 0.51 * (step * gain).abs() + 1e-5).all()


@torch.no_grad()
def test_what_somebody_wrote_to_is_no_sum_any_more(pair):
    conv, norm, x = pair
    y = conv(x)
    y.mul_(2)
    assert normed(norm, y) is None
    assert torch.equal(norm(y), plain(norm, y))
    assert normed(norm, conv(x) + 0) is None


def test_inference_mode_gives_the_same(pair):
    conv, norm, x = pair
    with torch.no_grad():
        expected = norm(conv(x))
    with torch.inference_mode():
        assert torch.equal(norm(conv(x)), expected)
        written = conv(x)
        written.add_(1)
        assert normed(norm, written) is None


def test_gradients_training_and_autocast_see_an_ordinary_norm(pair):
    conv, norm, x = pair
    assert normed(norm, conv(x)) is None
    with torch.no_grad():
        y = conv(x)
        assert normed(norm.train(), y) is None
        norm.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert normed(norm, y) is None


@torch.no_grad()
def test_a_norm_along_other_axes_is_an_ordinary_one():
    torch.manual_seed(0)
    layer, norm, x = nn.Linear(6, 5), nn.BatchNorm1d(5), torch.randn(8, 5, 6)
    model = nn.Sequential(layer, norm).eval()
    bw.prepare(model, bw.rules("w4a4"))
    bw.make_reproducible(bw.calibrate(model, [x]).eval())
    y = layer(x)
    assert y.shape == (8, 5, 5)
    assert torch.equal(norm(y), plain(norm, y))
