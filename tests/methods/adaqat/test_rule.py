import math

import pytest

from bitwright.methods.adaqat.rule import Width, bit_gradient, bits_of, curvatures, relative_update, update


def width(real, **options):
    return Width("layer", "weight", [], real, **options)


def test_the_update_equals_the_hand_computation():
    # L(4) = 0.50, L(3) = 0.53, lambda = 0.02, the other operand has 5 bits: 0.50 - 0.53 + 0.1 = 0.07.
    assert bit_gradient(0.50, 0.53, 0.02, 5) == pytest.approx(0.07)
    assert update(3.6, 0.50, 0.53, 0.02, 5, eta=0.1) == pytest.approx(3.6 - 0.007)
    # A bit that is worth more than it costs comes back: 0.50 - 0.70 + 0.1 = -0.1.
    assert update(3.6, 0.50, 0.70, 0.02, 5, eta=0.1) == pytest.approx(3.61)


@pytest.mark.parametrize(("real", "bits"), [(1.5, 2), (2.0, 2), (2.0001, 3), (7.2, 8), (8.0, 8)])
def test_operations_use_the_upper_integer(real, bits):
    assert bits_of(real) == bits == width(real).bits


def test_the_relative_update_is_the_update_over_the_cost_and_bounded():
    slope = 0.04
    for loss, probe in ((0.5, 0.51), (0.5, 0.53)):
        assert relative_update(5.0, probe - loss, slope, 0.25) == pytest.approx(
            update(5.0, loss, probe, 1.0, slope, 0.25 / slope)
        )
    assert relative_update(5.0, 9.0, slope, 0.25) == 5.25
    assert relative_update(5.0, -0.1, slope, 0.25) == 4.75


@pytest.mark.parametrize("freeze_after", [0, 3, 10])
def test_the_upward_move_after_freeze_after_ones_to_a_number_of_bits_freezes_there(freeze_after):
    w = width(3.9)
    for i in range(freeze_after + 1):
        assert not w.frozen
        w.move(2.9, 2, freeze_after)
        assert w.bits == 3
        w.move(3.1, 2, freeze_after)
        assert w.frozen == (i == freeze_after)
    assert w.real == 4.0
    assert w.arrivals == {4: freeze_after + 1}


def test_arrivals_are_counted_per_number_of_bits_and_upward_only():
    w = width(5.5)
    for real in (4.5, 3.5, 2.5, 3.5, 4.5, 3.5, 4.5, 3.5, 3.9, 3.2):
        w.move(real, 2, 2)
    assert w.arrivals == {4: 1, 5: 2}
    assert not w.frozen
    w.move(4.5, 2, 2)
    assert w.frozen
    assert w.real == 5.0


def test_the_real_width_is_clamped_and_the_floor_is_convergence():
    w = width(7.9)
    w.move(9.4, 2, 10)
    assert w.real == 8.0
    w.move(1.6, 2, 10)
    assert (w.real, w.bits, w.frozen) == (1.6, 2, False)
    w.move(1.5, 2, 10)
    assert (w.real, w.bits, w.frozen) == (2.0, 2, True)
    w = width(3.2)
    w.move(0.3, 3, None)
    assert (w.real, w.bits, w.frozen) == (2.5, 3, False)


def test_the_curvature_is_a_least_squares_fit_of_rounding_noise():
    w = width(6.0)
    assert curvatures([w], 2) == [1.0]
    a = 7.0
    for real in (6.0, 5.0, 4.0, 3.0):
        w.real = real
        w.observe(0.2, 0.2 + a * (4.0**-2 - 4.0**-real), 2)
    assert curvatures([w], 2) == pytest.approx([a])
    # A noisy observation of the eighth bit counts for next to nothing against those of the floor.
    w.real = 8.0
    w.observe(0.2, 0.2 + 0.01, 7)
    assert curvatures([w], 2) == pytest.approx([a], rel=1e-3)
    assert math.isfinite(w.fit_xx)


def test_a_width_that_was_seen_little_is_thought_to_be_like_the_others_of_its_role():
    x = 4.0**-2 - 4.0**-4
    harmful, harmless, unseen, other = (width(4.0) for _ in range(4))
    other.role = "input"
    for w, a in ((harmful, 9.0), (harmless, 1.0), (other, 100.0)):
        w.observe(0.5, 0.5 + a * x, 2)
    # One observation each, against `prior` = 4 of their mean, which probe the floor exactly (4^-2, not x).
    one, four = x * x, 4.0 * 16.0**-2
    expected = [(a * one + 5.0 * four) / (one + four) for a in (9.0, 1.0)]
    assert curvatures([harmful, harmless, unseen, other], 2) == pytest.approx([*expected, 5.0, 100.0])
    for _ in range(200):
        harmful.observe(0.5, 0.5 + 9.0 * x, 2)
    assert curvatures([harmful], 2) == pytest.approx([9.0])


def test_a_width_that_seems_to_do_good_where_it_is_short_keeps_a_little_worth():
    good, bad = width(4.0), width(4.0)
    bad.role = "input"
    good.observe(0.5, 0.4, 2)
    bad.observe(0.5, 0.6, 2)
    (low, high) = curvatures([good, bad], 2)
    assert low == pytest.approx(1e-3 * (high + 0.0) / 2)
