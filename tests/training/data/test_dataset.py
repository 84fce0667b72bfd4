import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import BitwrightError
from bitwright.training.data import dataset


def test_equal_keys_draw_equally_and_others_do_not() -> None:
    keys = [("a", 1, 2), ("a", 2, 1), ("a", 1, 2, 0), ("a", 12), ("b", 1, 2), ("a", 1, 3)]
    draws = [torch.rand(8, generator=dataset.generator(*key)).tolist() for key in keys]
    assert draws[0] == torch.rand(8, generator=dataset.generator("a", 1, 2)).tolist()
    assert len({tuple(d) for d in draws}) == len(keys)


def test_epoch_order_is_a_permutation_of_its_own_for_each_seed_and_epoch() -> None:
    orders = [dataset.epoch_order(50, seed=s, epoch=e) for s, e in itertools.product(range(3), range(3))]
    assert all(sorted(o.tolist()) == list(range(50)) for o in orders)
    assert len({tuple(o.tolist()) for o in orders}) == 9
    assert torch.equal(orders[4], dataset.epoch_order(50, seed=1, epoch=1))


def test_steps_drop_the_last_incomplete_batch_unless_it_is_the_only_one() -> None:
    assert [dataset.epoch_steps(10, b) for b in (1, 3, 5, 10, 11, 100)] == [10, 3, 2, 1, 1, 1]
    with pytest.raises(BitwrightError, match="batch size 0: accepted is at least 1"):
        dataset.epoch_steps(10, 0)


def test_calibration_never_repeats_an_image() -> None:
    batches = dataset.calibration_order(10, seed=0, batch_size=4, count=2)
    assert [len(b) for b in batches] == [4, 4]
    assert len(set(torch.cat(batches).tolist())) == 8
    everything = dataset.calibration_order(10, seed=0, batch_size=4, count=9)
    assert [len(b) for b in everything] == [4, 4, 2]
    assert torch.equal(torch.cat(everything)[:8], torch.cat(batches))
    assert dataset.calibration_order(10, seed=0, batch_size=4, count=0) == []


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
    shuffle=st.randoms(use_true_random=False),
)
def test_one_share_of_every_class_is_kept(counts: list[int], share: float, seed: int, shuffle) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    shuffle.shuffle(labels)
    n = max(1, round(share * len(labels)))
    kept = dataset.stratified(torch.tensor(labels), n, seed=seed)
    assert len(kept) == n
    assert kept.tolist() == sorted(set(kept.tolist()))
    of_class = torch.tensor(labels)[kept].bincount(minlength=len(counts)).tolist()
    lowest = max((k - 0.5) / count for k, count in zip(of_class, counts, strict=True))
    highest = min((k + 0.5) / count for k, count in zip(of_class, counts, strict=True))
    assert lowest <= highest + 1e-12  # one share that rounds to every class's number
    smaller = dataset.stratified(torch.tensor(labels), max(1, n // 2), seed=seed)
    assert set(smaller.tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("subset", [0, 11, -1, "3", 2.0, True])
def test_subset_out_of_range(subset: object) -> None:
    with pytest.raises(BitwrightError, match=r"data 'd': subset is .*, accepted is a number from 1 to 10"):
        dataset.take_subset(torch.zeros(10, dtype=torch.int64), subset, "d")  # pyright: ignore


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.1, 0.1], r"mean is \[0.5\], accepted is a list of 2 number\(s\)"),
        ("no", [0.1, 0.1], "mean is 'no', accepted is a list of 2"),
        ([0.5, "x"], [0.1, 0.1], "mean is .*, accepted is a list of 2"),
        ([0.5, 0.5], [0.1, 0], r"std is \[0.1, 0\], accepted are numbers above 0"),
    ],
)
def test_bad_statistics(mean: object, std: object, message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        dataset.check_statistics(mean, std, 2, "d")


def test_normalise_matches_float64() -> None:
    images = torch.randint(0, 256, (4, 2, 3, 3), dtype=torch.uint8)
    mean, std = np.array([0.2, 0.7]), np.array([0.3, 0.1])
    expected = (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    as_float32 = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
    found = dataset.normalise(images, *as_float32)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
