import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.costs.assignment import Row, solve, total


def test_costs_are_sums_over_rows():
    rows = [Row(100, 40, None, 8, 8), Row(1000, 80, 0, None, None), Row(500, 16, 1, None, 32), Row(7, 8, None, 32, 32)]
    pairs = [(3, 4), (2, 5)]
    assert total(rows, "bitops", pairs) == 100 * 64 + 1000 * 12 + 500 * 2 * 32 + 7 * 1024
    assert total(rows, "size", pairs) == 40 + 80 * 3 / 8 + 16 * 2 / 8 + 32


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=2, max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([("bitops",), ("size",), ("bitops", "size")]),
    st.floats(0.2, 1.1),
)
def test_the_choice_is_that_of_trying_them_all(sizes, seed, kinds, share):
    import random

    draw = random.Random(seed)
    rows = [Row(m, w, i, None, None) for i, (m, w) in enumerate(sizes)] + [Row(10, 10, None, 8, 8)]
    options = [[(w, a) for w in (2, 4, 8) for a in (2, 4)] for _ in sizes]
    losses = [[draw.uniform(-1, 5) for _ in each] for each in options]
    budget = {kind: share * total(rows, kind, [(8, 4)] * len(sizes)) for kind in kinds}
    inside = [
        (sum(losses[g][i] for g, i in enumerate(picks)), picks)
        for picks in itertools.product(range(6), repeat=len(sizes))
        if all(total(rows, k, [options[g][i] for g, i in enumerate(picks)]) <= b for k, b in budget.items())
    ]
    got = solve(rows, options, losses, budget)
    assert (got is None) == (not inside)
    if got is not None:
        assert all(total(rows, kind, got) <= limit for kind, limit in budget.items())
        value = sum(losses[g][options[g].index(pair)] for g, pair in enumerate(got))
        assert value == pytest.approx(min(inside)[0], rel=1e-3, abs=1e-3)


def test_a_least_share_is_kept_too():
    rows = [Row(100, 1, 0, None, None)]
    options, losses = [[(2, 2), (4, 4)]], [[0.0, 1.0]]
    assert solve(rows, options, losses, {"bitops": 1700.0}) == [(2, 2)]
    assert solve(rows, options, losses, {"bitops": 1700.0}, low=0.9) == [(4, 4)]
