import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import BitwrightError
from bitwright.costs.assignment import Row, total
from bitwright.methods.budget import meet_budget, near


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

    got = meet_budget(rows, present, curvature, budget, 2, "adaqat")
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
    assert meet_budget(rows, [(8, 8)], [(1.0, 1.0)], {"bitops": 1190.0}, 2, "adaqat") == [(3, 3)]
    assert meet_budget(rows, [(8, 8)], [(1.0, None)], {"size": 48.0}, 2, "adaqat") == [(3, 8)]


def test_a_budget_that_no_assignment_meets_is_refused():
    with pytest.raises(BitwrightError, match="adaqat: no assignment of 2 to 8 bits lies inside the budget"):
        meet_budget([Row(100, 100, 0, None, None)], [(4, 4)], [(1.0, 1.0)], {"bitops": 399.0}, 2, "adaqat")
