"""Numbers of few significant bits: rounded right, found again, and only where they were meant."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.layers.significant import (
    MOST,
    MOST_TOGETHER,
    bias_bits,
    landed,
    landed_together,
    neighbours,
    on_steps,
    rounded,
    rounded_together,
    significant_bits,
)


@given(st.floats(1e-20, 1e20), st.integers(2, 20), st.sampled_from([-1, 1]))
def test_rounding_to_bits_is_that_of_python(x, bits, sign):
    mantissa, exponent = math.frexp(x)
    expected = math.ldexp(round(mantissa * 2**bits), exponent - bits)
    tie = abs(mantissa * 2**bits % 1 - 0.5) < 1e-9
    found = float(rounded(torch.tensor([sign * x], dtype=torch.float64), bits))
    assert tie or found == sign * expected


@pytest.mark.parametrize("bits", [7, 10, MOST])
def test_neighbours_are_all_numbers_around(bits):
    x = torch.tensor([1.3, 0.0123, -3.7e-4], dtype=torch.float64)
    found = neighbours(x, bits, 3)
    assert torch.equal(found[0], rounded(x, bits))
    places = found / (x / torch.frexp(x)[0]).abs() * 2**bits  # whole numbers of `bits` bits
    assert torch.equal(places - places[0], torch.tensor([0, 1, -1, 2, -2, 3, -3]).double()[:, None].expand(7, 3))
    at_the_end = neighbours(torch.tensor([1.999999], dtype=torch.float64), bits, 2)
    assert torch.equal(rounded(at_the_end, bits), at_the_end)
    assert at_the_end.min() < 2 < at_the_end.max()
    assert torch.equal(found.sign(), x.sign().expand_as(found))


def test_short_scales_are_found_again_after_rounding_and_others_stay():
    generator = torch.Generator().manual_seed(0)
    short = rounded(torch.rand(100, generator=generator) * 1e-2 + 1e-4, 9).float()
    off = short * (1 + 2.0**-23 * torch.randint(-1, 2, (100,), generator=generator))
    assert not torch.equal(off, short)
    assert torch.equal(landed(off), short)
    long = torch.rand(100, generator=generator)
    assert torch.equal(landed(long), long)
    mixed = torch.where(torch.arange(100) == 50, long, off)
    assert torch.equal(landed(mixed), mixed)
    single = torch.tensor([0.5000001])
    assert torch.equal(landed(single), single)


@pytest.mark.parametrize("bits", [9, MOST_TOGETHER])
def test_biases_share_one_power_of_two(bits):
    generator = torch.Generator().manual_seed(bits)
    bias = torch.randn(50, generator=generator).double() * 0.3
    short = rounded_together(bias, bits)
    unit = 2.0 ** (math.frexp(float(bias.abs().max()))[1] - bits)
    assert torch.equal((short / unit).round() * unit, short)
    assert 0 < float((short - bias).abs().max()) <= unit / 2
    noise = 2.0**-24 * torch.randn(50, generator=generator).double()
    assert torch.equal(landed_together(short + noise, torch.ones(50)), short)
    assert torch.equal(landed_together(bias, torch.ones(50)), bias)
    assert torch.equal(rounded_together(torch.zeros(3), bits), torch.zeros(3).double())


@given(st.floats(1e-4, 10.0), st.floats(-5, 5))
def test_biases_in_front_of_a_quantizer_are_at_most_a_64th_of_a_step_off(step, bias):
    found = float(on_steps(torch.tensor([bias], dtype=torch.float64), step))
    assert abs(found - bias) <= step / 64 * (1 + 1e-12)


def test_bits_of_scales_and_biases():
    assert [significant_bits(b) for b in (1, 2, 4, 8)] == [5, 8, 10, 14]
    assert [bias_bits(b) for b in (1, 2, 4, 8)] == [9, 10, 12, 16]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_scales_move_no_boundary_of_codes_by_more_than_a_64th(bits):
    scale = torch.rand(2000, dtype=torch.float64) + 0.5
    farthest = 2**bits - 1.5  # in codes, of an unsigned quantizer
    moved = (rounded(scale, significant_bits(bits)) / scale - 1).abs() * farthest
    assert moved.max() <= 1 / 64
    assert moved.max() > 1 / 256, "and are no longer than that takes"
