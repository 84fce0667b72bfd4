"""A data set from the user's own Python: `FILE.py:NAME` or `MODULE:NAME`."""

import dataclasses
import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from bitwright.errors import BitwrightError
from bitwright.training.data.dataset import Batch, calibration_order, epoch_order, epoch_steps, generator
from bitwright.training.data.loading import Sample, default_workers, load_batches
from bitwright.training.own_code import Own, find_own

RETURNS = "a function that returns two torch datasets, (train, test)"
SAMPLE = "(tensor, label): float32 for images and the like, int64 for tokens; label a whole number"


@dataclasses.dataclass(frozen=True, eq=False)
class OwnDataset:
    """A `Dataset` of two torch map-style datasets, whose samples are (tensor, label).

    blank: see `Dataset`. workers: processes that load, 0 for none.
    """

    own: Own
    num_classes: int
    train: Any
    test: Any
    blank: Tensor
    workers: int

    @property
    def name(self) -> str:
        return self.own.name

    @property
    def in_channels(self) -> int:
        return self.blank.shape[1] if self.blank.ndim > 1 else 1

    @property
    def image_size(self) -> int | None:
        shape = self.blank.shape
        return shape[-1] if len(shape) == 4 and shape[-1] == shape[-2] else None

    @property
    def train_size(self) -> int:
        return len(self.train)

    @property
    def test_size(self) -> int:
        return len(self.test)

    def steps_per_epoch(self, batch_size: int) -> int:
        return epoch_steps(self.train_size, batch_size)

    def train_batches(
        self, *, epoch: int, seed: int, batch_size: int, device: torch.device | str, start: int = 0
    ) -> Iterator[Batch]:
        order = epoch_order(self.train_size, seed=seed, epoch=epoch)
        steps = range(start, self.steps_per_epoch(batch_size))
        index = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
        return self._batches("train", self.train, index, device, ("train", seed, epoch))

    def test_batches(self, *, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        epoch_steps(self.test_size, batch_size)
        return self._batches("test", self.test, list(torch.arange(self.test_size).split(batch_size)), device, ("test",))

    def calibration_batches(
        self, *, seed: int, batch_size: int, count: int, device: torch.device | str
    ) -> Iterator[Batch]:
        index = calibration_order(self.train_size, seed=seed, batch_size=batch_size, count=count)
        return self._batches("train", self.train, index, device, ("calibration", seed))

    def _batches(
        self, split: str, samples: Any, index: Sequence[Tensor], device: torch.device | str, key: tuple[int | str, ...]
    ) -> Iterator[Batch]:
        return load_batches(_Samples(self, split, samples, key), index, self.workers, device)


@dataclasses.dataclass(frozen=True)
class _Samples(data.Dataset[Sample]):
    """The user's samples as `load_batches` wants them.

    key: with the sample's index it seeds all random states that the user's code may draw from.
    """

    owner: OwnDataset
    split: str
    samples: Any
    key: tuple[int | str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        blank = self.owner.blank[0]
        try:
            with seeded(*self.key, index):
                x, label = read_sample(self.owner.own, self.split, self.samples, index)
        except BitwrightError as error:
            return str(error)
        where = f"data {self.owner.name!r}: {self.split} sample {index}"
        if x.shape != blank.shape or x.dtype != blank.dtype:
            return (
                f"{where} is {x.dtype} of shape {tuple(x.shape)}, the first one {blank.dtype} of shape "
                f"{tuple(blank.shape)}; samples are stacked, so all must be alike"
            )
        if not 0 <= label < self.owner.num_classes:
            return f"{where} has label {label}; accepted are 0 to {self.owner.num_classes - 1}"
        return x, label


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Python's, numpy's and torch's global random states follow from `key` inside, and are as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(generator(*key).initial_seed())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach for the GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def read_sample(own: Own, split: str, samples: Any, index: int) -> tuple[Tensor, int]:
    """One sample of the user's. Raises: BitwrightError where their code raises or returns something else."""
    where = f"{split} sample {index}"
    try:
        sample = samples[index]
    except Exception as error:
        raise own.error(f"{where} cannot be read ({own.said(error)})") from error
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise own.error(f"{where} is a {type(sample).__name__}; accepted is {SAMPLE}")
    x, label = sample
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor):
        raise own.error(f"{where} begins with a {type(x).__name__}; accepted is {SAMPLE}")
    if x.dtype not in (torch.float32, torch.int64):
        raise own.error(f"{where} is {x.dtype}; accepted is {SAMPLE}")
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = None
    if number is None or number != label:
        raise own.error(f"{where} has label {label!r}; accepted is {SAMPLE}")
    return x, number


def own_data(
    name: str, *, data_dir: str | Path | None = None, workers: int | None = None, **options: Any
) -> OwnDataset:
    """What a function of the user's (`own_code.find_own`) returns: (train, test), two map-style datasets of torch.

    It is called with `options`, and with `data_dir` where it has that parameter. Samples are (tensor, label), the
    training set's augmented, all of one shape and type; what they draw from Python's, numpy's and torch's random
    states is seeded by (seed, epoch, sample), so that runs repeat and resume exactly. Calibration sees training
    samples. Classes: the length of `train.classes`, as torchvision's sets have it, or the number `train.num_classes`.

    workers: processes that load; default one a core, at most 8; 0: none, for sets in memory.

    Raises: BitwrightError for a file or name that is not there, code that raises, and samples of another form.
    """
    own = find_own("data", name, RETURNS)
    if workers is None:
        workers = default_workers()
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise own.error(f"workers is {workers!r}, accepted is a number from 0")
    made = own.made({"data_dir": None if data_dir is None else str(data_dir)}, options)
    splits = made if isinstance(made, tuple | list) else ()
    if len(splits) != 2 or not all(isinstance(s, Sized) and hasattr(s, "__getitem__") for s in splits):
        raise own.error(f"returned a {type(made).__name__}; use {RETURNS}, with a length and samples by number")
    train, test = splits
    for split, samples in (("train", train), ("test", test)):
        if len(samples) == 0:
            raise own.error(f"the {split} set is empty")
    with seeded("first"):
        x, _ = read_sample(own, "train", train, 0)
    return OwnDataset(own, _classes(own, train), train, test, torch.zeros_like(x)[None], workers)


def _classes(own: Own, train: Any) -> int:
    names = getattr(train, "classes", None)
    number = len(names) if isinstance(names, Sized) else getattr(train, "num_classes", None)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise own.error("how many classes? Give the training set an attribute `classes` (names) or `num_classes`")
    return number
