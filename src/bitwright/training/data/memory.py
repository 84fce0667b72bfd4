"""Small sets kept whole, as bytes, on the training device, and augmented a batch at a time."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.training.data.dataset import (
    Batch,
    calibration_order,
    epoch_order,
    epoch_steps,
    generator,
    normalise,
)


def shift_flip(images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pad with zeros, crop back to the same size at given places, then mirror some images left to right.

    images: (N, C, H, W), any dtype. rows, columns: (N,) int64 in 0 … 2·padding, the corner of each crop in the
    padded image (padding, padding is no shift). flips: (N,) bool. Zero is black: raw images are padded, before
    they are normalised.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, places, places, H, W)
    cropped = windows[torch.arange(len(images), device=images.device), :, rows, columns]
    return torch.where(flips[:, None, None, None], cropped.flip(-1), cropped)


def draw_shift_flip(count: int, padding: int, flip: bool, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, `columns`, `flips` for `shift_flip`; drawn on the CPU, so that every device sees the same images."""
    rows, columns = torch.randint(0, 2 * padding + 1, (2, count), generator=rng)
    coins = torch.randint(0, 2, (count,), generator=rng).bool()
    return rows, columns, coins & flip


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryDataset:
    """A `Dataset` of uint8 tensors.

    images (N, C, H, W) uint8 and labels (N,) int64 of each split; mean, std: per channel, of pixels in [0, 1].
    padding, flip: the augmentation of training images, `shift_flip`; 0 and False for none.
    """

    name: str
    num_classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    _placed: dict[torch.device, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1]

    @property
    def blank(self) -> Tensor:
        return torch.zeros(1, *self.train_images.shape[1:])

    @property
    def train_size(self) -> int:
        return len(self.train_images)

    @property
    def test_size(self) -> int:
        return len(self.test_images)

    def steps_per_epoch(self, batch_size: int) -> int:
        return epoch_steps(self.train_size, batch_size)

    def train_batches(
        self, *, epoch: int, seed: int, batch_size: int, device: torch.device | str, start: int = 0
    ) -> Iterator[Batch]:
        images, labels, _, _, mean, std = self._on(device)
        order = epoch_order(self.train_size, seed=seed, epoch=epoch).to(device)
        for step in range(start, self.steps_per_epoch(batch_size)):
            index = order[step * batch_size : (step + 1) * batch_size]
            rng = generator("augment", seed, epoch, step)
            rows, columns, flips = (d.to(device) for d in draw_shift_flip(len(index), self.padding, self.flip, rng))
            batch = shift_flip(images[index], rows, columns, flips, self.padding)
            yield normalise(batch, mean, std), labels[index]

    def test_batches(self, *, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        _, _, images, labels, mean, std = self._on(device)
        epoch_steps(self.test_size, batch_size)
        for first in range(0, self.test_size, batch_size):
            batch = slice(first, first + batch_size)
            yield normalise(images[batch], mean, std), labels[batch]

    def calibration_batches(
        self, *, seed: int, batch_size: int, count: int, device: torch.device | str
    ) -> Iterator[Batch]:
        images, labels, _, _, mean, std = self._on(device)
        for index in calibration_order(self.train_size, seed=seed, batch_size=batch_size, count=count):
            index = index.to(device)
            yield normalise(images[index], mean, std), labels[index]

    def _on(self, device: torch.device | str) -> tuple[Tensor, ...]:
        device = torch.device(device)
        if device not in self._placed:
            statistics = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels, *statistics)
            self._placed[device] = tuple(t.to(device) for t in tensors)
        return self._placed[device]
