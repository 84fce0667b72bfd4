"""What the training loop asks of a data set, and the order in which every data set answers."""

import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import BitwrightError

# Samples (N, ...), of images (N, C, H, W) float32, normalised; labels (N,) int64; both on the device.
Batch = tuple[Tensor, Tensor]


class Dataset(Protocol):
    """A training and a test split of labelled samples: images, except in a user's own set.

    blank: one sample of zeros, (1, ...), as batches have them. in_channels: its axis 1. image_size: height and width
    of square images, else None.

    Nothing here reads or moves torch's global random state: every draw comes from a generator of its own, seeded by
    (seed, epoch, step or sample), so that a run that resumes in the middle of an epoch sees what it would have seen.
    """

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def blank(self) -> Tensor: ...
    @property
    def train_size(self) -> int: ...
    @property
    def test_size(self) -> int: ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one epoch: the last incomplete one is dropped, unless it is the only one."""
        ...

    def train_batches(
        self, *, epoch: int, seed: int, batch_size: int, device: torch.device | str, start: int = 0
    ) -> Iterator[Batch]:
        """Shuffled, augmented batches of one epoch, from step `start` on; equal for equal (seed, epoch)."""
        ...

    def test_batches(self, *, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """The whole test split in its own order, not augmented; the last batch may be smaller."""
        ...

    def calibration_batches(
        self, *, seed: int, batch_size: int, count: int, device: torch.device | str
    ) -> Iterator[Batch]:
        """At most `count` batches of distinct random training images, not augmented."""
        ...


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`: the same key, the same draws; another key, unrelated ones.

    The key is hashed because neighbouring seeds of one generator family are not promised to be unrelated.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_steps(train_size: int, batch_size: int) -> int:
    """See `Dataset.steps_per_epoch`. Raises: BitwrightError for a batch size below 1."""
    if batch_size < 1:
        raise BitwrightError(f"batch size {batch_size}: accepted is at least 1")
    return max(1, train_size // batch_size)


def epoch_order(train_size: int, *, seed: int, epoch: int) -> Tensor:
    """The permutation of training indices for one epoch, (train_size,) int64."""
    return torch.randperm(train_size, generator=generator("order", seed, epoch))


def calibration_order(train_size: int, *, seed: int, batch_size: int, count: int) -> list[Tensor]:
    """Index batches for `Dataset.calibration_batches`, each (≤ batch_size,) int64, no index twice."""
    epoch_steps(train_size, batch_size)
    order = torch.randperm(train_size, generator=generator("calibration", seed))
    return list(order[: batch_size * count].split(batch_size)) if count > 0 else []


def stratified(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Sorted indices of `count` samples that keep one share of every class, each class's number rounded.

    Subsets of one seed are nested: a larger one contains a smaller one. Drawn by `numpy.random.RandomState`, whose
    stream is frozen, so that the choice is the same in every version.
    """
    random = np.random.RandomState(seed)
    classes = labels.numpy()
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        place[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(np.sort(np.lexsort((classes, place))[:count]))


def take_subset(labels: Tensor, subset: int | None, name: str) -> Tensor:
    """The training indices that the option `subset` leaves: all of them for None.

    Raises: BitwrightError for a size outside 1 … len(labels).
    """
    if subset is None:
        return torch.arange(len(labels))
    if not isinstance(subset, int) or isinstance(subset, bool) or not 1 <= subset <= len(labels):
        raise BitwrightError(f"data {name!r}: subset is {subset!r}, accepted is a number from 1 to {len(labels)}")
    return stratified(labels, subset, seed=0)


def check_statistics(mean: object, std: object, channels: int, name: str) -> tuple[tuple[float, ...], ...]:
    """`mean` and `std` as tuples of one float a channel. Raises: BitwrightError for anything else."""
    checked = []
    for key, values in (("mean", mean), ("std", std)):
        numbers = values if isinstance(values, (list, tuple)) else None
        if numbers is None or len(numbers) != channels or not all(isinstance(v, (int, float)) for v in numbers):
            raise BitwrightError(f"data {name!r}: {key} is {values!r}, accepted is a list of {channels} number(s)")
        if key == "std" and min(numbers) <= 0:
            raise BitwrightError(f"data {name!r}: std is {values!r}, accepted are numbers above 0")
        checked.append(tuple(float(v) for v in numbers))
    return tuple(checked)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std; images (N, C, H, W) uint8, mean and std (C, 1, 1) float32 on the same device."""
    return (images.float() / 255 - mean) / std
