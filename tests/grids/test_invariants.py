"""What holds for every grid, bit-width, role and signedness, on tensors that hypothesis finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from making import make_quantizer

GRIDS = ["lsq", "lsq+", "pact", "dorefa", "sat", "minmax", "tqt", "seq"]

finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)
tensors = st.lists(finite, min_size=6, max_size=24).map(lambda v: torch.tensor(v[: len(v) // 3 * 3]).view(1, 3, -1))
choices = st.tuples(
    st.sampled_from(GRIDS), st.integers(1, 8), st.sampled_from(["weight", "input"]), st.booleans(), st.booleans()
)


def built(choice, x):
    grid, bits, role, signed, per_channel = choice
    data = x.movedim(1, 0) if role == "weight" else x
    return make_quantizer(grid, bits, data, role=role, signed=signed, channels=3 if per_channel else 1).eval(), data


def per_value(q, t, like):
    """A vector of scales or zero points laid along the channels of `like`."""
    if t.numel() == 1:
        return t
    return t.view(3, 1, 1) if q.shape.role == "weight" else t.view(1, 3, 1)


@settings(max_examples=300, deadline=None)
@given(choices, tensors)
def test_values_lie_on_the_grid_that_affine_describes(choice, x):
    q, x = built(choice, x)
    y, codes, affine = q(x), q.integer_codes(x), q.affine(x if q.shape.role == "weight" else None)
    assert codes.dtype == torch.int32
    assert codes.shape == x.shape
    assert codes.min() >= affine.lo
    assert codes.max() <= affine.hi
    assert affine.hi - affine.lo < 2 ** int(q.bits.item())
    scale, zero = per_value(q, affine.scale, x), per_value(q, affine.zero, x)
    assert (scale > 0).all()
    again = (codes - zero) * scale
    if choice[0] == "sat":  # two products round apart there
        torch.testing.assert_close(again, y.detach(), rtol=1e-6, atol=0)
    else:
        assert torch.equal(again, y.detach())


@settings(max_examples=200, deadline=None)
@given(choices, tensors)
def test_at_most_two_to_the_bits_values_per_scale(choice, x):
    q, x = built(choice, x)
    y = q(x).detach()
    rows = y.movedim(q.shape.axis, 0).flatten(1) if q.shape.channels > 1 else y.reshape(1, -1)
    assert max(row.unique().numel() for row in rows) <= 2 ** choice[1]


@settings(max_examples=200, deadline=None)
@given(choices, tensors)
def test_inside_the_range_the_error_is_at_most_half_a_step(choice, x):
    q, x = built(choice, x)
    if choice[0] in ("dorefa", "sat") and choice[2] == "weight":
        return  # weights are bent by tanh first
    affine = q.affine(x if q.shape.role == "weight" else None)
    scale, zero = per_value(q, affine.scale, x), per_value(q, affine.zero, x)
    low, high = (affine.lo - zero) * scale, (affine.hi - zero) * scale
    inside = (x >= low) & (x <= high)
    error = (q(x) - x).abs()
    slack = 1e-5 * (x.abs() + scale * zero.abs() + scale)
    assert (~inside | (error <= scale / 2 + slack)).all()


@settings(max_examples=200, deadline=None)
@given(choices, tensors)
def test_quantizing_twice_changes_nothing(choice, x):
    if choice[0] in ("dorefa", "sat", "minmax", "tqt") and choice[2] == "weight":
        return  # their range follows the tensor itself
    q, x = built(choice, x)
    once = q(x).detach()
    torch.testing.assert_close(q(once).detach(), once, rtol=1e-6, atol=1e-30)


@settings(max_examples=200, deadline=None)
@given(choices, tensors)
def test_order_is_kept(choice, x):
    q, x = built((*choice[:4], False), x)
    order = x.flatten().argsort()
    assert (q(x).detach().flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_filter_of_zeros_is_safe(grid, bits):
    w = torch.randn(4, 2, 3, 3)
    w[1] = 0
    w.requires_grad_()
    q = make_quantizer(grid, bits, w.detach(), channels=4)
    y = q(w)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(w.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in q.parameters() if p.grad is not None)
    assert (q.affine(w).scale > 0).all()
    if bits > (2 if grid == "seq" else 1) and grid not in ("dorefa", "sat"):  # those have no code for zero
        assert y[1].abs().max() == 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_tensor_stays_empty(grid, training):
    q = make_quantizer(grid, 4, torch.rand(2, 3, 4), role="input").train(training)
    x = torch.empty(0, 3, 4, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("estimator", ["ste", "clipped_ste", "ewgs", "dsq"])
@pytest.mark.parametrize("role", ["weight", "input"])
def test_nan_is_kept_and_infinity_is_clipped(grid, estimator, role):
    data = torch.randn(2, 3, 4)
    q = make_quantizer(grid, 4, data, role=role, estimator=estimator).eval()
    x = data.clone()
    x[0, 0, 0] = torch.nan
    assert torch.isnan(q(x)[0, 0, 0])
    if role == "input" and estimator != "ste":
        x[0, 0, 0] = torch.inf
        assert torch.isfinite(q(x)).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_those_of_the_forward_pass_in_training_too(grid):
    x = torch.rand(4, 3, 8)
    q = make_quantizer(grid, 4, x, role="input").train()
    before = {n: b.clone() for n, b in q.named_buffers()}
    codes = q.integer_codes(x * 2)
    assert q.grid.training
    assert all(torch.equal(before[n], b) for n, b in q.named_buffers()), "asking for codes moves no statistic"
    affine = q.affine()
    assert torch.equal((codes - affine.zero) * affine.scale, q.eval()(x * 2).detach())
