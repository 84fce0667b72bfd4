import copy

import pytest
import torch
from torch import nn

from bitwright import QuantizerSpec, Rule, calibrate, prepare
from bitwright.methods.csq.planes import CERTAIN, BitPlanes, follow_masks, hard_codes, soft_codes


def layer(bits=5, per_channel=True, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3).to(dtype))
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=bits, per_channel=per_channel))])
    calibrate(net, [torch.randn(4, 6, dtype=dtype)]).train()
    return net[0]


def planes_of(linear, temperature=1.0, start=1.0):
    t = torch.full((1,), temperature, dtype=linear.weight.dtype)
    return BitPlanes("0", linear.weight_quantizer, linear.weight, t, start)


def test_two_planes_by_hand():
    """Two weights, T = 2: 1 (s(2) - s(-2)) s(1) + 2 (s(0) - s(1)) s(-3), and so on, in float64."""
    s = lambda v: 1 / (1 + torch.exp(torch.tensor(-v, dtype=torch.float64)))  # noqa: E731
    up = torch.tensor([[1.0, -0.5], [0.0, 2.0]], dtype=torch.float64)
    down = torch.tensor([[-1.0, 0.25], [0.5, -2.0]], dtype=torch.float64)
    mask = torch.tensor([0.5, -1.5], dtype=torch.float64)
    worth, t = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    expected = [
        (s(2.0) - s(-2.0)) * s(1.0) + 2 * (s(0.0) - s(1.0)) * s(-3.0),
        (s(-1.0) - s(0.5)) * s(1.0) + 2 * (s(4.0) - s(-4.0)) * s(-3.0),
    ]
    torch.testing.assert_close(soft_codes(up, down, mask, worth, t), torch.stack(expected), rtol=1e-14, atol=0)
    # Without the soft plane: 1 - 0 and 0 - 1. What is exactly 0 is off.
    assert hard_codes(up, down, mask, worth).tolist() == [1.0, -1.0]
    assert hard_codes(up, down, -mask, worth).tolist() == [-2.0, 2.0]


def test_the_gradients_are_those_of_the_formula():
    """Through the layer, of every logit and of the scale, beside autograd of s sum 2^b / (2^N - 1) (...)."""
    linear = layer(bits=5, per_channel=False, dtype=torch.float64)
    planes = planes_of(linear, temperature=1.7)
    with torch.no_grad():
        for leaf in planes.leaves():
            leaf.add_(torch.randn_like(leaf))
    g = torch.randn(3, 6, dtype=torch.float64)
    out = linear.weight_quantizer(linear.weight)
    (out * g).sum().backward()
    up, down, mask = (t.detach().clone().requires_grad_() for t in planes.leaves())
    s = (linear.weight_quantizer.grid.scale.detach() * 15).requires_grad_()
    w = 0.0
    for b in range(4):
        bit = torch.sigmoid(1.7 * up[b]) - torch.sigmoid(1.7 * down[b])
        w = w + s * 2**b / 15 * bit * torch.sigmoid(1.7 * mask[b])
    torch.testing.assert_close(out.detach(), w.detach(), rtol=1e-10, atol=1e-12)
    (w * g).sum().backward()
    for ours, theirs in zip(planes.leaves(), (up, down, mask), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    # The scale is LSQ's, with LSQ's factor 1 / sqrt(N Qp): 18 weights, codes up to 15.
    torch.testing.assert_close(linear.weight_quantizer.grid.scale.grad, s.grad * 15 / (18 * 15) ** 0.5)
    assert not linear.weight.grad.any()


@pytest.mark.parametrize("per_channel", [True, False])
def test_training_starts_where_the_weights_were(per_channel):
    linear = layer(bits=8, per_channel=per_channel)
    before = linear.weight.detach().clone()
    planes = planes_of(linear, start=0.2)
    planes.write()
    step = before.abs().amax(1 if per_channel else None, keepdim=True) / 127
    assert ((linear.weight - before).abs() <= 0.501 * step).all()
    torch.testing.assert_close(linear.weight_quantizer(linear.weight), linear.weight.detach())


def test_a_channel_of_zeros_starts_at_zero():
    linear = layer()
    with torch.no_grad():
        linear.weight[1] = 0
    planes = planes_of(linear)
    planes.write()
    assert not linear.weight[1].any()
    assert linear.weight.isfinite().all()


@pytest.mark.parametrize("window", [(0, 3), (1, 3), (2, 3), (0, 1), (2, 2)])
def test_hard_weights_are_codes_of_the_width_times_the_scale(window):
    linear = layer(bits=5)
    planes = planes_of(linear, start=0.5)
    with torch.no_grad():
        for leaf in (planes.up, planes.down):
            leaf.add_(torch.randn_like(leaf))
    s = linear.weight_quantizer.grid.scale.detach().clone()
    logits = [t.detach().clone() for t in (planes.up, planes.down)]
    planes.choose(window)
    planes.temperature.fill_(1e6)
    soft = linear.weight_quantizer(linear.weight).detach()
    planes.harden()
    planes.write()
    quantizer = linear.weight_quantizer
    assert int(quantizer.bits) == planes.bits == window[1] - window[0] + 2
    value = sum(
        2.0**b * ((logits[0][b] > 0).float() - (logits[1][b] > 0).float()) for b in range(window[0], window[1] + 1)
    )
    # The paper's: w / s is a whole number of the lowest plane's steps.
    torch.testing.assert_close(linear.weight.detach(), s[:, None] * value, rtol=1e-6, atol=0)
    torch.testing.assert_close(soft, linear.weight.detach(), rtol=1e-6, atol=1e-9)
    for training in (True, False):
        assert torch.equal(linear.train(training).weight_quantizer(linear.weight), linear.weight)
    affine, codes = quantizer.affine(linear.weight), quantizer.integer_codes(linear.weight)
    assert affine.lo <= -(2 ** (planes.bits - 1) - 1) <= int(codes.min())
    assert int(codes.max()) <= affine.hi == 2 ** (planes.bits - 1) - 1
    assert torch.equal(codes * affine.scale[:, None], linear.weight)
    assert torch.equal(codes.float() * 2 ** window[0], value)


def test_hard_weights_follow_their_scale_and_nothing_else():
    linear = layer()
    planes = planes_of(linear)
    planes.choose((1, 3))
    planes.harden()
    planes.write()
    codes = linear.weight_quantizer.integer_codes(linear.weight)
    with torch.no_grad():
        linear.weight_quantizer.grid.scale.mul_(1.37)
        linear.weight.mul_(0.9)  # weight decay
    planes.write()
    assert torch.equal(linear.weight_quantizer.integer_codes(linear.weight), codes)
    g = torch.randn(3, 6)
    (linear.weight_quantizer(linear.weight) * g).sum().backward()
    factor = (6 * 7) ** -0.5  # 6 weights a channel, codes up to 7
    torch.testing.assert_close(linear.weight_quantizer.grid.scale.grad, (g * codes).sum(1) * factor)


def test_widths_follow_the_masks_and_the_value_stays():
    linear = layer(bits=5)
    planes = planes_of(linear)
    before = linear.weight_quantizer(linear.weight).detach()
    for logits, bits, kept in (
        ([-0.1, -0.1, 0.0, 0.1], 3, [2, 3]),
        ([0.1, -0.1, -0.1, -0.1], 2, [0]),
        ([0.1, -0.1, 0.1, -0.1], 4, [0, 2]),  # a hole costs its width
        ([-3.0, -0.2, -0.1, -0.3], 2, [2]),  # never no plane
    ):
        with torch.no_grad():
            planes.mask.copy_(torch.tensor(logits))
        follow_masks([planes])
        assert (int(linear.weight_quantizer.bits), planes.kept) == (bits, kept)
        with torch.no_grad():
            planes.mask.zero_()
        torch.testing.assert_close(linear.weight_quantizer(linear.weight).detach(), before)
    assert follow_masks([planes]) == [planes]


def test_chosen_masks_are_one_and_zero_to_the_last_bit():
    planes = planes_of(layer(bits=5))
    planes.choose((1, 2))
    assert torch.sigmoid(planes.mask).tolist() == [0.0, 1.0, 1.0, 0.0]
    assert planes.mask.abs().eq(CERTAIN).all()
    assert not planes.mask.requires_grad


def test_evaluation_and_bypass_see_the_ordinary_quantizer():
    linear = layer()
    planes = planes_of(linear)
    planes.write()
    plain = copy.deepcopy(linear.weight_quantizer)
    plain._forward_hooks.clear()
    quantizer = linear.weight_quantizer.eval()
    assert torch.equal(quantizer(linear.weight), plain(linear.weight))
    quantizer.train().bypass = True
    assert quantizer(linear.weight) is linear.weight
