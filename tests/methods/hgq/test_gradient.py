import math

import pytest
import torch

from bitwright import BitwrightError, QuantizerSpec
from bitwright.grids import Shape, Stats
from bitwright.kernels import fused_available
from bitwright.methods.hgq.gradient import BitSlot, expected_gain, with_bit_gradient
from bitwright.quantizer import Quantizer

LN2 = math.log(2.0)


def quantizer(grid="lsq", bits=3, channels=1, scale=0.25, role="weight", dtype=torch.float64):
    made = Quantizer(QuantizerSpec(bits=bits, grid=grid), Shape(role, channels=channels, numel=64)).to(dtype)
    made.initialize(Stats.of(torch.linspace(-1, 1, 64, dtype=dtype).repeat(channels, 1)))
    with torch.no_grad():
        if grid == "lsq":
            made.grid.scale.fill_(scale)
        else:
            made.grid.log2_scale.fill_(math.log2(scale))
    return made


@pytest.mark.parametrize("f", [0.7, 2.0, 3.4])
def test_on_a_power_of_two_grid_it_is_the_derivative_through_a_rounded_exponent(f):
    """HGQ's own forward: x_q = round(x 2^f) 2^-f with f and the product rounded by straight-through estimators."""

    def rounded(t):
        return t + (t.round() - t).detach()

    torch.manual_seed(0)
    x, g = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    exponent = torch.tensor([f], dtype=torch.float64, requires_grad=True)
    power = torch.exp2(rounded(exponent))
    theirs = rounded(x * power) / power
    (expected,) = torch.autograd.grad((theirs * g).sum(), exponent)
    real = torch.tensor([f], dtype=torch.float64, requires_grad=True)
    ours = with_bit_gradient(theirs.detach(), x, torch.exp2(-exponent.round()), real)
    assert torch.equal(ours, theirs)
    ours.backward(g)
    torch.testing.assert_close(real.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", ["lsq", "tqt"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_slot_has_the_gradient_of_the_rounding_error_and_changes_nothing_else(grid, channels):
    torch.manual_seed(1)
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 20, dtype=torch.float64)
    plain, slotted = quantizer(grid, channels=channels), quantizer(grid, channels=channels)
    slot = BitSlot("layer", "weight", [slotted], "hgq")
    outputs, gradients = [], []
    for q in (plain, slotted):
        x.grad = None
        y = q(x)
        y.backward(g)
        outputs.append(y.detach())
        gradients.append([x.grad.clone(), *(p.grad.clone() for p in q.grid.parameters())])
    assert torch.equal(*outputs)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    # 3 bits at a step of 0.25: codes -4 ... 3; what lies more than half a step outside is clipped.
    rounding = (x > -4.5 * 0.25) & (x < 3.5 * 0.25)
    assert not rounding.all()
    expected = (-LN2 * (outputs[0] - x) * g)[rounding].sum()
    assert slot.real.grad.item() == pytest.approx(expected.item(), rel=1e-5)
    assert slot.values == 60


def test_inputs_count_the_values_of_one_sample_and_probes_leave_no_gradient():
    q = quantizer(role="input")
    slot = BitSlot("layer", "input", [q], "hgq")
    q(torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True))
    assert slot.values == 12
    with torch.no_grad():
        assert q(torch.ones(2, dtype=torch.float64)).requires_grad is False
    q.eval()
    assert q(torch.ones(2, 3, dtype=torch.float64)).grad_fn is not None  # of the scale alone
    assert slot.values == 12
    slot.detach()
    q.train()(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    assert slot.real.grad is None


def test_where_the_scale_is_at_its_optimum_holding_the_range_or_the_step_gives_the_same_slope():
    """There dL/ds = sum_in g (k - v) + sum_out g k = 0, so -ln 2 sum_in g (x_q - x) = ln 2 sum_out g x_q: the slope of
    the clipped values, whose bound doubles with each bit while the step stays."""
    torch.manual_seed(2)
    x = torch.randn(400, dtype=torch.float64)
    q = quantizer(bits=4)
    for _ in range(300):
        y = q(x)
        (slope,) = torch.autograd.grad(0.5 * (y - x).square().sum(), q.grid.scale)
        q.grid.scale.data -= 2e-3 * slope
    assert abs(slope.item()) < 0.05
    slot = BitSlot("layer", "weight", [q], "hgq")
    y = q(x)
    (0.5 * (y - x).square().sum()).backward()
    error = (y - x).detach()
    clipped = error.abs() > 0.5 * q.grid.effective_scale().item()
    assert clipped.any()
    held_step = LN2 * (error * y.detach())[clipped].sum().item()
    assert slot.real.grad.item() < 0
    assert slot.real.grad.item() == pytest.approx(held_step, rel=0.05)


def test_the_gain_of_a_slope_is_that_of_its_curve():
    for a, b in ((3.0, 2), (0.5, 5)):
        h = 1e-6
        slope = a * (4.0 ** -(b + h) - 4.0 ** -(b - h)) / (2 * h)
        assert expected_gain(slope, b) == pytest.approx(a, rel=1e-6)
    assert expected_gain(0.3, 4) == 0.0


@pytest.mark.skipif(not fused_available(), reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_and_narrow_types_agree_with_double_precision(dtype):
    torch.manual_seed(3)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    g = torch.randn(2, 3, 8, 8).to(dtype)
    found = []
    for kind in (dtype, torch.float64):
        q = quantizer(bits=3, role="input", dtype=torch.float32 if kind == dtype else kind)
        slot = BitSlot("layer", "input", [q], "hgq")
        y = q(x.to(kind).requires_grad_(True))
        assert y.dtype == kind
        y.backward(g.to(kind))
        found.append(slot.real.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5 if dtype == torch.float32 else 0.03)


def test_grids_without_a_step_and_widths_that_differ_are_refused():
    other = Quantizer(QuantizerSpec(bits=4, grid="pact"), Shape("input"))
    other.name = "conv.input_quantizer"
    with pytest.raises(BitwrightError, match=r"hgq: the grid 'pact' of conv.input_quantizer has no step"):
        BitSlot("conv", "input", [other], "hgq")
    with pytest.raises(BitwrightError, match=r"hgq: conv: input bits are \[3, 4\] by the rules"):
        BitSlot("conv", "input", [quantizer(bits=3), quantizer(bits=4)], "hgq")
