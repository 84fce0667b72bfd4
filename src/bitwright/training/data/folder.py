"""Sets too large for memory: picture files in class folders, decoded by worker processes."""

import dataclasses
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import data

from bitwright.errors import BitwrightError
from bitwright.training.data.dataset import (
    Batch,
    calibration_order,
    check_statistics,
    epoch_order,
    epoch_steps,
    normalise,
    take_subset,
)
from bitwright.training.data.loading import Sample, default_workers, load_batches
from bitwright.training.data.pictures import import_pillow, open_picture, plain_pixels, train_pixels
from bitwright.training.data.sources import search_folders

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclasses.dataclass(frozen=True)
class Split:
    """Picture files and their classes, in the order of class and file names."""

    paths: list[Path]
    labels: Tensor  # (N,) int64


@dataclasses.dataclass(frozen=True, eq=False)
class FolderDataset:
    """A `Dataset` of files. image_size, resize: see `imagefolder`; workers: processes that decode, 0 for none."""

    name: str
    num_classes: int
    train: Split
    test: Split
    image_size: int
    resize: int
    workers: int
    augment: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_channels: int = 3

    @property
    def blank(self) -> Tensor:
        return torch.zeros(1, self.in_channels, self.image_size, self.image_size)

    @property
    def train_size(self) -> int:
        return len(self.train.paths)

    @property
    def test_size(self) -> int:
        return len(self.test.paths)

    def steps_per_epoch(self, batch_size: int) -> int:
        return epoch_steps(self.train_size, batch_size)

    def train_batches(
        self, *, epoch: int, seed: int, batch_size: int, device: torch.device | str, start: int = 0
    ) -> Iterator[Batch]:
        order = epoch_order(self.train_size, seed=seed, epoch=epoch)
        steps = range(start, self.steps_per_epoch(batch_size))
        index = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
        return self._batches(self.train, index, device, (seed, epoch) if self.augment else None)

    def test_batches(self, *, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        epoch_steps(self.test_size, batch_size)
        return self._batches(self.test, list(torch.arange(self.test_size).split(batch_size)), device, None)

    def calibration_batches(
        self, *, seed: int, batch_size: int, count: int, device: torch.device | str
    ) -> Iterator[Batch]:
        index = calibration_order(self.train_size, seed=seed, batch_size=batch_size, count=count)
        return self._batches(self.train, index, device, None)

    def _batches(
        self, split: Split, index: Sequence[Tensor], device: torch.device | str, key: tuple[int, int] | None
    ) -> Iterator[Batch]:
        device = torch.device(device)
        mean, std = (torch.tensor(v).view(-1, 1, 1).to(device) for v in (self.mean, self.std))
        samples = _Pictures(split, self.image_size, self.resize, key)
        for images, labels in load_batches(samples, index, self.workers, device):
            yield normalise(images.permute(0, 3, 1, 2).contiguous(), mean, std), labels


@dataclasses.dataclass(frozen=True)
class _Pictures(data.Dataset[Sample]):
    """Pixels and class of one file.

    key: (seed, epoch) of augmented pictures, each drawn by its own (seed, epoch, sample); None for the test view.
    """

    split: Split
    size: int
    resize: int
    key: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, index: int) -> Sample:
        try:
            picture = open_picture(self.split.paths[index])
        except BitwrightError as error:
            return str(error)
        label = int(self.split.labels[index])
        if self.key is None:
            return plain_pixels(picture, self.size, self.resize), label
        return train_pixels(picture, self.size, random.Random(repr((*self.key, index)))), label


def imagefolder(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache: str | Path | None = None,
    image_size: int = 224,
    resize: int | None = None,
    workers: int | None = None,
    subset: int | None = None,
    augment: bool = True,
    mean: object = MEAN,
    std: object = STD,
) -> FolderDataset:
    """`data_dir`/train/<class>/* and `data_dir`/val/<class>/*; classes are numbered in the order of their names.

    Training: a random resized crop to `image_size` and a mirror (`augment=False`: as in the test). Test: the shorter
    side resized to `resize` (default: 8/7 of `image_size`, 256 for 224), the centre cropped. workers: default one a
    core, at most 8. Also looked for in the system's data folder and the cache, under `name`; never downloaded.

    Raises: BitwrightError where Pillow is not installed, for missing or empty folders, class folders that differ
    between train and val, bad options; while iterating, for a file that is not an image, naming it.
    """
    import_pillow()
    resize = image_size * 8 // 7 if resize is None else resize
    workers = default_workers() if workers is None else workers
    for option, value, least in (
        ("image_size", image_size, 1),
        ("resize", resize, image_size),
        ("workers", workers, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BitwrightError(f"data {name!r}: {option} is {value!r}, accepted is a number from {least}")
    folders = search_folders(name, data_dir, cache)
    root = next((f for f in folders if (f / "train").is_dir()), None)
    if root is None:
        places = ", ".join(str(f) for f in folders)
        raise BitwrightError(
            f"data {name!r} not found in {places}; give data_dir=FOLDER with train/<class>/* and val/<class>/* "
            "(it is never downloaded)"
        )
    classes = _classes(root / "train")
    odd = sorted(set(classes) ^ set(_classes(root / "val")))
    if odd:
        inside, outside = ("train", "val") if odd[0] in classes else ("val", "train")
        raise BitwrightError(
            f"{root}: class folders of train and val differ, {odd[0]!r} is in {inside} and not in {outside} "
            f"({len(odd)} such)"
        )
    train, test = _scan(root / "train", classes), _scan(root / "val", classes)
    kept = take_subset(train.labels, subset, name)
    mean_, std_ = check_statistics(mean, std, 3, name)
    return FolderDataset(
        name=name,
        num_classes=len(classes),
        train=Split([train.paths[i] for i in kept.tolist()], train.labels[kept]),
        test=test,
        image_size=image_size,
        resize=resize,
        workers=workers,
        augment=augment,
        mean=mean_,
        std=std_,
    )


def _classes(folder: Path) -> list[str]:
    try:
        names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise BitwrightError(f"{folder}: cannot be read ({error.strerror})") from error
    if not names:
        raise BitwrightError(f"{folder}: holds no class folders")
    return sorted(names)


def _scan(folder: Path, classes: list[str]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = sorted(e.name for e in os.scandir(folder / name) if not e.name.startswith("."))
        files = [folder / name / e for e in entries if Path(e).suffix.lower() in SUFFIXES]
        if not files:
            raise BitwrightError(f"{folder / name}: holds no images ({', '.join(sorted(SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    return Split(paths, torch.tensor(labels))
