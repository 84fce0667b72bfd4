import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.training.data.dataset import epoch_order, generator
from bitwright.training.data.memory import MemoryDataset, draw_shift_flip, shift_flip


def slow_shift_flip(image: Tensor, row: int, column: int, flip: bool, padding: int) -> list:
    """One image, pixel by pixel: what lands at (y, x) comes from the padded image's (row + y, column + x')."""
    channels, height, width = image.shape
    out = torch.zeros_like(image).tolist()
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                source_y, source_x = row + y - padding, column + (width - 1 - x if flip else x) - padding
                if 0 <= source_y < height and 0 <= source_x < width:
                    out[c][y][x] = int(image[c, source_y, source_x])
    return out


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    padding=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_batched_augmentation_is_the_slow_one_image_by_image(shape: tuple, padding: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=rng)
    rows, columns, flips = draw_shift_flip(len(images), padding, True, rng)
    found = shift_flip(images, rows, columns, flips, padding)
    assert found.dtype == torch.uint8
    expected = [
        slow_shift_flip(i, int(r), int(c), bool(f), padding)
        for i, r, c, f in zip(images, rows, columns, flips, strict=True)
    ]
    assert found.tolist() == expected


def test_draws_cover_every_shift_and_both_sides_evenly() -> None:
    rows, columns, flips = draw_shift_flip(30000, 2, True, torch.Generator().manual_seed(0))
    for places in (rows, columns):
        assert ((places.bincount(minlength=5) / 30000 - 0.2).abs() < 0.01).all()
    joint = (rows * 5 + columns).bincount(minlength=25) / 30000
    assert ((joint - 0.04).abs() < 0.006).all()
    assert abs(flips.float().mean().item() - 0.5) < 0.01
    assert not draw_shift_flip(1000, 2, False, torch.Generator().manual_seed(0))[2].any()


@pytest.fixture
def data() -> MemoryDataset:
    rng = torch.Generator().manual_seed(7)
    return MemoryDataset(
        name="tiny",
        num_classes=3,
        train_images=torch.randint(0, 256, (21, 2, 5, 5), dtype=torch.uint8, generator=rng),
        train_labels=torch.arange(21),  # each its own, to follow images through the shuffle
        test_images=torch.randint(0, 256, (7, 2, 5, 5), dtype=torch.uint8, generator=rng),
        test_labels=torch.arange(7),
        mean=(0.4, 0.6),
        std=(0.2, 0.3),
        padding=1,
        flip=True,
    )


def by_hand(data: MemoryDataset, images: Tensor) -> Tensor:
    mean, std = torch.tensor(data.mean).view(-1, 1, 1), torch.tensor(data.std).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def test_what_it_says_of_itself(data: MemoryDataset) -> None:
    assert (data.in_channels, data.image_size, data.train_size, data.test_size) == (2, 5, 21, 7)


def test_an_epoch_is_every_image_once_in_the_epochs_order_and_augmented(data: MemoryDataset) -> None:
    batches = list(data.train_batches(epoch=2, seed=5, batch_size=4, device="cpu"))
    assert len(batches) == data.steps_per_epoch(4) == 5
    labels = torch.cat([y for _, y in batches])
    assert torch.equal(labels, epoch_order(21, seed=5, epoch=2)[:20])
    for step, (x, y) in enumerate(batches):
        draws = draw_shift_flip(4, 1, True, generator("augment", 5, 2, step))
        slow = [
            slow_shift_flip(data.train_images[i], int(r), int(c), bool(f), 1)
            for i, r, c, f in zip(y.tolist(), *draws, strict=True)
        ]
        assert x.dtype == torch.float32
        assert torch.equal(x, by_hand(data, torch.tensor(slow)))


@pytest.mark.parametrize("batch_size", [1, 4, 21, 50])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(data: MemoryDataset, batch_size: int) -> None:
    arguments = {"epoch": 1, "seed": 3, "batch_size": batch_size, "device": "cpu"}
    whole = list(data.train_batches(**arguments))
    for start in range(len(whole) + 1):
        torch.rand(start)  # whatever else was drawn meanwhile
        rest = list(data.train_batches(**arguments, start=start))
        assert len(rest) == len(whole) - start
        for (x, y), (a, b) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_the_global_random_state_is_neither_read_nor_moved(data: MemoryDataset) -> None:
    def everything() -> list[Tensor]:
        train = data.train_batches(epoch=0, seed=0, batch_size=4, device="cpu")
        calibration = data.calibration_batches(seed=0, batch_size=4, count=2, device="cpu")
        return [x for x, _ in [*train, *calibration, *data.test_batches(batch_size=4, device="cpu")]]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = everything()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


def test_seeds_and_epochs_augment_differently(data: MemoryDataset) -> None:
    one_image = dataclasses.replace(data, train_images=data.train_images[:1].repeat(21, 1, 1, 1), padding=2)
    views = {
        tuple(next(one_image.train_batches(epoch=e, seed=s, batch_size=21, device="cpu"))[0].flatten().tolist())
        for e in range(3)
        for s in range(3)
    }
    assert len(views) == 9


def test_test_images_come_whole_in_order_and_plain(data: MemoryDataset) -> None:
    batches = list(data.test_batches(batch_size=3, device="cpu"))
    assert [len(y) for _, y in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]), by_hand(data, data.test_images))
    assert torch.equal(torch.cat([y for _, y in batches]), data.test_labels)


def test_calibration_images_are_plain_training_images(data: MemoryDataset) -> None:
    batches = list(data.calibration_batches(seed=1, batch_size=4, count=3, device="cpu"))
    labels = torch.cat([y for _, y in batches])
    assert len(set(labels.tolist())) == 12
    assert torch.equal(torch.cat([x for x, _ in batches]), by_hand(data, data.train_images[labels]))
    other = torch.cat([y for _, y in data.calibration_batches(seed=2, batch_size=4, count=3, device="cpu")])
    assert not torch.equal(labels, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_sees_the_same_images_and_keeps_the_set(data: MemoryDataset) -> None:
    arguments = {"epoch": 1, "seed": 3, "batch_size": 4}
    for (x, y), (a, b) in zip(
        data.train_batches(**arguments, device="cuda"), data.train_batches(**arguments, device="cpu"), strict=True
    ):
        assert x.device.type == y.device.type == "cuda"
        torch.testing.assert_close(x.cpu(), a)
        assert torch.equal(y.cpu(), b)
