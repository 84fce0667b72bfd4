import itertools

import pytest

from bitwright import BitwrightError
from bitwright.costs.assignment import Row, total
from bitwright.methods.csq.rule import Pull, drop_planes, in_pairs, kept_planes, temperature_at, windows


def test_temperature_grows_exponentially():
    assert [temperature_at(p, 200.0) for p in (0.0, 0.5, 1.0, 1.5)] == pytest.approx([1.0, 200**0.5, 200.0, 200.0])


def test_a_mask_of_one_half_is_kept_and_one_plane_always():
    assert kept_planes([-0.1, 0.0, 0.3]) == [1, 2]
    assert kept_planes([-0.3, -0.1, -0.2]) == [1]


def test_layers_of_equal_cost_are_pulled_as_in_the_paper():
    """(r - target / N) for every layer, r the share of masks that are kept: 3 layers of 7 planes, 2.5 wanted."""
    rows = [Row(0, 8, i, None, 32) for i in range(3)]
    pull = Pull(rows, {"size": 3.5 * 3}, [8, 8, 8])  # 2.5 planes and the sign
    for widths in ([8, 8, 8], [3, 4, 5], [2, 2, 3]):
        r = sum(b - 1 for b in widths) / 21
        assert pull.at(widths) == pytest.approx([r - 2.5 / 7] * 3)
    assert pull.at([2, 2, 2])[0] < 0, "below the target planes grow back"


def test_a_layer_is_pulled_by_its_share_and_the_tightest_limit_pulls():
    rows = [Row(100, 10, 0, None, 4), Row(300, 10, 1, None, 4)]
    pull = Pull(rows, {"bitops": 4000.0, "size": 5.0}, [5, 5])
    # bitops: 8000 at the start, 1600 with signs alone. size: 12.5 and 2.5.
    assert pull.at([5, 5]) == pytest.approx([0.75 * 1.0, 0.75 * 1.0])  # size is passed by 7.5 / 10, bitops by 4 / 6.4
    assert pull.at([2, 2]) == pytest.approx([0.0, 0.0])  # size is met, bitops 0.125 below
    only = Pull(rows, {"bitops": 4000.0}, [5, 5]).at([5, 5])
    assert only == pytest.approx([0.625 * 0.5, 0.625 * 1.5])


def test_the_window_of_each_width_that_loses_least():
    found = windows([1, 2, 5], [0, 0.5, 0.1, 0, 0, 0.9])
    assert found == {
        2: (pytest.approx(0.6), (5, 5)),
        3: (pytest.approx(0.9), (1, 2)),
        5: (pytest.approx(0.5), (2, 5)),
        6: (pytest.approx(0.0), (1, 5)),
    }


def test_the_dropped_planes_are_the_best_of_all_choices():
    rows = [Row(0, n, i, None, 32) for i, n in enumerate((10, 30, 20))]
    kept = [[0, 1, 2], [1, 3], [0, 1, 2, 3]]
    logits = [[0.1, 0.2, 0.9], [0, 0.3, 0, 0.8], [0.05, 0.1, 0.4, 0.2]]
    for limit in (40.0, 30.0, 20.0, 18.0, 15.0):
        chosen = drop_planes(rows, {"size": limit}, kept, logits)
        lost = lambda some: sum(  # noqa: E731
            v
            for k, m, (lo, hi) in zip(kept, logits, some, strict=True)
            for b, v in enumerate(m)
            if b in k and not lo <= b <= hi
        )
        size = lambda some: total(rows, "size", in_pairs([hi - lo + 2 for lo, hi in some]))  # noqa: E731
        every = itertools.product(*[[(a, b) for a in k for b in k if a <= b] for k in kept])
        inside = [some for some in every if size(some) <= limit]
        assert size(chosen) <= limit
        assert lost(chosen) == pytest.approx(min(map(lost, inside)))
    assert drop_planes(rows, {"size": 100.0}, kept, logits) == [(0, 2), (1, 3), (0, 3)]
    with pytest.raises(BitwrightError, match="csq: no choice of the planes that are left"):
        drop_planes(rows, {"size": 14.9}, kept, logits)
