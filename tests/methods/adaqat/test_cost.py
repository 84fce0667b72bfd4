import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import BitwrightError
from bitwright.methods.adaqat.cost import Row, meet_budget, near, parse_budget, total


def test_costs_are_sums_over_rows():
    rows = [Row(100, 40, None, 8, 8), Row(1000, 80, 0, None, None), Row(500, 16, 1, None, 32), Row(7, 8, None, 32, 32)]
    pairs = [(3, 4), (2, 5)]
    assert total(rows, "bitops", pairs) == 100 * 64 + 1000 * 12 + 500 * 2 * 32 + 7 * 1024
    assert total(rows, "size", pairs) == 40 + 80 * 3 / 8 + 16 * 2 / 8 + 32


def estimate(pairs, curvature):
    each = [zip(pair, slopes, strict=True) for pair, slopes in zip(pairs, curvature, strict=True)]
    return sum(a * 4.0**-b for widths in each for b, a in widths)


@settings(max_examples=12, deadline=None)
@given(
    macs=st.lists(st.integers(1, 50), min_size=3, max_size=3),
    weights=st.lists(st.integers(1, 50), min_size=3, max_size=3),
    slopes=st.lists(st.floats(0.01, 10.0), min_size=6, max_size=6),
    target=st.lists(st.tuples(st.integers(2, 8), st.integers(2, 8)), min_size=3, max_size=3),
    kinds=st.sampled_from([("bitops",), ("size",), ("bitops", "size")]),
)
def test_the_assignment_is_the_best_of_all_in_reach_that_meet_the_budget(macs, weights, slopes, target, kinds):
    rows = [Row(m, w, i, None, None) for i, (m, w) in enumerate(zip(macs, weights, strict=True))]
    curvature = [(slopes[2 * i], slopes[2 * i + 1]) for i in range(3)]
    present = [(4, 4)] * 3
    budget = {kind: total(rows, kind, target) for kind in kinds}

    def allowed(pairs, low):
        return all(low * limit <= total(rows, kind, pairs) <= limit for kind, limit in budget.items())

    got = meet_budget(rows, present, curvature, budget, 2)
    assert allowed(got, 0.99)
    for reach in range(1, 7):
        options = [near(pair, a, reach, 2) for pair, a in zip(present, curvature, strict=True)]
        inside = [pairs for pairs in itertools.product(*options) if allowed(pairs, 0.99)]
        if inside:
            best = min(estimate(pairs, curvature) for pairs in inside)
            assert estimate(got, curvature) <= best + 2e-3 * max(estimate([(2, 2)] * 3, curvature), best)
            break


def test_without_an_assignment_within_a_hundredth_the_best_one_inside_is_taken():
    rows = [Row(100, 100, 0, None, None)]
    assert meet_budget(rows, [(8, 8)], [(1.0, 1.0)], {"bitops": 1190.0}, 2) == [(3, 3)]
    assert meet_budget(rows, [(8, 8)], [(1.0, None)], {"size": 48.0}, 2) == [(3, 8)]


def test_a_budget_that_no_assignment_meets_is_refused():
    with pytest.raises(BitwrightError, match="no assignment of 2 to 8 bits lies inside the budget"):
        meet_budget([Row(100, 100, 0, None, None)], [(4, 4)], [(1.0, 1.0)], {"bitops": 399.0}, 2)


def test_amounts_are_numbers_or_text_with_a_unit():
    assert parse_budget({"bitops": "0.51G", "size": "120KB"}) == {"bitops": 0.51e9, "size": 120e3}
    assert parse_budget({"bitops": "0.5e9", "size": "1.5 MiB"}) == {"bitops": 0.5e9, "size": 1.5 * 1024**2}
    assert parse_budget({"bitops": 5, "size": "64 B"}) == {"bitops": 5.0, "size": 64.0}
    assert parse_budget(None) == {}


@pytest.mark.parametrize("budget", [{"latency": 1}, {"size": 0}, {"size": "-4KB"}, {"bitops": "many"}, {"size": "3XB"}])
def test_other_amounts_are_refused(budget):
    with pytest.raises(BitwrightError, match="adaqat: budget") as caught:
        parse_budget(budget)
    assert "\n" not in str(caught.value)
