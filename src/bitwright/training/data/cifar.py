"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their official binary layout: 50,000 + 10,000 colour 32×32 images.

A record is one label byte (CIFAR-100: a coarse, then a fine one) and 3,072 bytes, the red, green and blue planes.
The python version is a pickle, which executes what it holds when it is opened, and is refused.
"""

import dataclasses
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.cache import cache_folder
from bitwright.errors import BitwrightError
from bitwright.training.data.dataset import check_statistics, take_subset
from bitwright.training.data.memory import MemoryDataset
from bitwright.training.data.sources import Remote, fetch_missing, search_folders

SIDE = 32
SIZES = (SIDE, 16, 8)
PIXELS = 3 * SIDE * SIDE


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the two sets: its names, its files, the records in each, and the statistics of its training images."""

    name: str
    num_classes: int
    label_bytes: int  # the last of them is the class
    train_files: tuple[str, ...]
    train_records: int  # in each training file
    test_file: str
    test_records: int
    folder: str
    pickles: tuple[str, ...]  # names that only the python version has
    remote: Remote
    mean: tuple[float, ...]
    std: tuple[float, ...]


_HOME = "https://www.cs.toronto.edu/~kriz"
CIFAR10 = Layout(
    name="cifar10",
    num_classes=10,
    label_bytes=1,
    train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    train_records=10000,
    test_file="test_batch.bin",
    test_records=10000,
    folder="cifar-10-batches-bin",
    pickles=("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"),
    remote=Remote(f"{_HOME}/cifar-10-binary.tar.gz", 170052171, "c32a1d4ab5d03f1284b67883e8d87530"),
    mean=(0.49140, 0.48216, 0.44653),
    std=(0.24703, 0.24349, 0.26159),
)
CIFAR100 = Layout(
    name="cifar100",
    num_classes=100,
    label_bytes=2,
    train_files=("train.bin",),
    train_records=50000,
    test_file="test.bin",
    test_records=10000,
    folder="cifar-100-binary",
    pickles=("cifar-100-python.tar.gz", "cifar-100-python", "meta"),
    remote=Remote(f"{_HOME}/cifar-100-binary.tar.gz", 168513733, "03b5dce01913d631647c71ecec9e9cb8"),
    mean=(0.50708, 0.48655, 0.44092),
    std=(0.26733, 0.25644, 0.27615),
)


def cifar(
    layout: Layout,
    *,
    data_dir: str | Path | None = None,
    cache: str | Path | None = None,
    download: bool = True,
    subset: int | None = None,
    image_size: int = SIDE,
    augment: bool = True,
    mean: object = None,
    std: object = None,
) -> MemoryDataset:
    """CIFAR from `data_dir`, the system's folder, the cache, or, where `download` allows it, the source.

    Accepted in each: the .bin files, the folder they unpack to, the -binary.tar.gz itself (read in memory).
    image_size: pixels a side, 32, 16 or 8; smaller images are averages over squares of the original, for experiments
    that a CPU can afford (a quarter of the cost each time). augment: pad an eighth of the side (4 of 32), crop, mirror.
    mean, std: the set's own at 32 pixels by default.

    Raises: BitwrightError for files that are missing, of another size or pickled, for labels outside the classes,
    and for another `image_size`.
    """
    if image_size not in SIZES:
        raise BitwrightError(
            f"data {layout.name!r}: image_size is {image_size!r}, accepted are {', '.join(map(str, SIZES))}"
        )
    files = _read(_find(layout, data_dir, cache, download), layout)
    splits = {where: _decode(content, where, layout) for where, content in files.items()}
    *train, (test_images, test_labels) = splits.values()
    images, labels = torch.cat([i for i, _ in train]), torch.cat([lab for _, lab in train])
    kept = take_subset(labels, subset, layout.name)
    statistics = (layout.mean if mean is None else mean, layout.std if std is None else std)
    mean_, std_ = check_statistics(*statistics, 3, layout.name)
    return MemoryDataset(
        name=layout.name,
        num_classes=layout.num_classes,
        train_images=_shrink(images[kept], image_size),
        train_labels=labels[kept],
        test_images=_shrink(test_images, image_size),
        test_labels=test_labels,
        mean=mean_,
        std=std_,
        padding=image_size // 8 if augment else 0,
        flip=augment,
    )


def _shrink(images: Tensor, size: int) -> Tensor:
    """(N, C, 32, 32) uint8 -> (N, C, size, size) uint8, means of squares, halves to even."""
    if size == SIDE:
        return images
    square = SIDE // size
    # In parts: in float32 the whole set would take four times its memory.
    parts = [F.avg_pool2d(part.float(), square).round().to(torch.uint8) for part in images.split(5000)]
    return torch.cat(parts)


def _find(layout: Layout, data_dir: str | Path | None, cache: str | Path | None, download: bool) -> Path:
    folders = search_folders(layout.name, data_dir, cache)
    for folder in folders:
        for place in (folder, folder / layout.folder, folder / layout.remote.name):
            if place.is_file() or (place / layout.train_files[0]).is_file():
                return place
        for name in layout.pickles:
            if (folder / name).exists():
                raise BitwrightError(
                    f"{folder / name}: the python version of {layout.name} is a pickle and is not opened; "
                    f"get the binary version, {layout.remote.url}"
                )
    target = cache_folder(cache) / layout.name
    remedy = f"get {layout.remote.name} from {_HOME}/cifar.html and give its folder as data_dir"
    fetch_missing(layout.name, folders, [layout.remote], target, allowed=download, remedy=remedy)
    return target / layout.remote.name


def _read(place: Path, layout: Layout) -> dict[str, bytes]:
    """The contents of the training files, then of the test file, by the place they came from."""
    record = layout.label_bytes + PIXELS
    sizes = dict.fromkeys(layout.train_files, layout.train_records * record)
    sizes[layout.test_file] = layout.test_records * record
    if place.is_file():
        return _read_archive(place, sizes, layout.folder)
    contents = {}
    for name, size in sizes.items():
        path = place / name
        try:
            found = path.stat().st_size
            content = path.read_bytes() if found == size else b""
        except OSError as error:
            raise BitwrightError(f"{path}: cannot be read ({error.strerror})") from error
        if found != size:
            raise BitwrightError(f"{path}: damaged, expected {size} bytes, found {found}")
        contents[str(path)] = content
    return contents


def _read_archive(path: Path, sizes: dict[str, int], folder: str) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                parent, _, name = member.name.rpartition("/")
                if parent.removeprefix("./") != folder or name not in sizes or not member.isfile():
                    continue
                if member.size != sizes[name]:
                    raise BitwrightError(
                        f"{path}: {member.name} is damaged, expected {sizes[name]} bytes, found {member.size}"
                    )
                file = archive.extractfile(member)
                contents[name] = file.read() if file else b""
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise BitwrightError(f"{path}: cannot be read ({error})") from error
    for name in sizes:
        if name not in contents:
            raise BitwrightError(f"{path}: holds no {folder}/{name}")
    return {f"{path}: {name}": contents[name] for name in sizes}


def _decode(content: bytes, where: str, layout: Layout) -> tuple[Tensor, Tensor]:
    records = np.frombuffer(content, np.uint8).reshape(-1, layout.label_bytes + PIXELS)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.num_classes:
        raise BitwrightError(f"{where}: label {labels.max()}, accepted are 0 to {layout.num_classes - 1}")
    images = records[:, layout.label_bytes :].reshape(-1, 3, SIDE, SIDE).copy()
    return torch.from_numpy(images), torch.from_numpy(labels)
