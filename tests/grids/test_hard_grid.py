"""The grid in front of Hardswish and Hardsigmoid: LSQ whose scale goes a whole number of times into 3."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitwright.grids import Shape, code_range
from bitwright.grids.hard import HardLSQ


@pytest.mark.parametrize("scale", [0.0001, 0.0234, 0.031, 0.05, -0.07, 0.4, 2.0, 9.0])
def test_the_scale_is_the_nearest_part_of_three(scale):
    grid, codes = HardLSQ(Shape("input")), code_range(8, True)
    grid.scale.data.fill_(scale)
    found, n = grid.affine(None, codes).scale.numpy()[0], np.clip(np.rint(3 / abs(scale)), 1, 128)
    assert found == np.float32(3) / np.float32(n)


def test_every_gate_is_codes_within_bounds():
    grid, codes, k = HardLSQ(Shape("input")), code_range(8, True), torch.arange(-128.0, 128.0)
    for n in range(1, 129):
        grid.scale.data.fill_(3 / n)
        x = k * grid.affine(None, codes).scale
        gate = (k.clamp(-n, n) + n) / (2 * n)
        torch.testing.assert_close(F.hardsigmoid(x), gate, rtol=0, atol=3e-7)


def test_values_and_gradients_are_lsqs_at_that_scale(make):
    x = torch.randn(4, 3, 50, dtype=torch.float64) * 3
    hard, plain = (make(grid, 8, x, role="input", signed=True) for grid in ("hard", "lsq"))
    hard.grid.scale.data.fill_(0.0511)
    plain.grid.scale.data.fill_(3 / 59 - 1e-12)
    seen = []
    for q in (hard, plain):
        leaf = x.clone().requires_grad_()
        y = q(leaf)
        y.backward(torch.ones_like(y).cumsum(-1))
        seen.append((y.detach(), leaf.grad, q.grid.scale.grad))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert seen[0][2].abs() > 0
