"""Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 + 10,000 gray 28×28 images, 10 classes, in IDX files."""

import dataclasses
import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from bitwright.cache import cache_folder
from bitwright.errors import BitwrightError
from bitwright.training.data.dataset import check_statistics, take_subset
from bitwright.training.data.memory import MemoryDataset
from bitwright.training.data.sources import Remote, fetch_missing, search_folders

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MEAN, STD = (0.2860,), (0.3530,)


@dataclasses.dataclass(frozen=True)
class IdxFile:
    """One file of the set: its unpacked name, the shape of its bytes, and what the source publishes."""

    name: str
    shape: tuple[int, ...]
    remote: Remote


def _file(name: str, shape: tuple[int, ...], size: int, md5: str) -> IdxFile:
    return IdxFile(name, shape, Remote(f"{URL}{name}.gz", size, md5))


FILES = {
    "train_images": _file("train-images-idx3-ubyte", (60000, 28, 28), 26421880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "train_labels": _file("train-labels-idx1-ubyte", (60000,), 29515, "25c81989df183df01b3e8a0aad5dffbe"),
    "test_images": _file("t10k-images-idx3-ubyte", (10000, 28, 28), 4422102, "bef4ecab320f06d8554ea6380940ec79"),
    "test_labels": _file("t10k-labels-idx1-ubyte", (10000,), 5148, "bb300cfdad3c16e7a12a480ee83cd310"),
}


def fashion_mnist(
    files: dict[str, IdxFile],
    *,
    data_dir: str | Path | None = None,
    cache: str | Path | None = None,
    download: bool = True,
    subset: int | None = None,
    augment: bool = True,
    mean: object = MEAN,
    std: object = STD,
) -> MemoryDataset:
    """Fashion-MNIST from `data_dir`, the system's folder, the cache, or, where `download` allows it, the source.

    Files may be gzipped or not, in the folder itself, in `fashion-mnist/` or in torchvision's `FashionMNIST/raw/`.
    files: `FILES`. augment: pad 2, crop 28, mirror.

    Raises: BitwrightError for files that are missing, truncated or of another shape, and for labels above 9.
    """
    folder = _find(data_dir, cache, download, files)
    data = {key: read_idx(_path(folder, file), file.shape) for key, file in files.items()}
    for key in ("train_labels", "test_labels"):
        if data[key].max() > 9:
            raise BitwrightError(f"{_path(folder, files[key])}: label {int(data[key].max())}, accepted are 0 to 9")
    labels = data["train_labels"].long()
    kept = take_subset(labels, subset, "fashion-mnist")
    mean_, std_ = check_statistics(mean, std, 1, "fashion-mnist")
    return MemoryDataset(
        name="fashion-mnist",
        num_classes=10,
        train_images=data["train_images"][kept][:, None],
        train_labels=labels[kept],
        test_images=data["test_images"][:, None],
        test_labels=data["test_labels"].long(),
        mean=mean_,
        std=std_,
        padding=2 if augment else 0,
        flip=augment,
    )


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file, gzipped if its name ends in .gz, as a uint8 tensor of `shape`.

    The header is 0, 0, 8 (bytes), the number of dimensions, then each as a big-endian uint32.

    Raises: BitwrightError naming the file where header or size differ, or the gzip stream is damaged.
    """
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    expected = len(header) + int(torch.Size(shape).numel())
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(expected + 1)  # never more than needed, whatever the file inflates to
    except (OSError, EOFError, zlib.error) as error:
        raise BitwrightError(f"{path}: cannot be read ({error})") from error
    if content[: len(header)] != header:
        raise BitwrightError(f"{path}: header is {content[: len(header)].hex()}, expected {header.hex()}")
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(content)}"
        raise BitwrightError(f"{path}: damaged, expected {expected} bytes (unpacked), found {found}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[len(header) :].view(shape)


def _path(folder: Path, file: IdxFile) -> Path:
    raw = folder / file.name
    return raw if raw.is_file() else folder / f"{file.name}.gz"


def _find(data_dir: str | Path | None, cache: str | Path | None, allowed: bool, files: dict[str, IdxFile]) -> Path:
    folders = []
    for folder in search_folders("fashion-mnist", data_dir, cache):
        folders += [folder, folder / "fashion-mnist", folder / "FashionMNIST" / "raw"]
    for folder in folders:
        absent = [f.name for f in files.values() if not _path(folder, f).is_file()]
        if not absent:
            return folder
        if len(absent) < len(files) and folder.parent != cache_folder(cache):
            raise BitwrightError(f"{folder}: incomplete Fashion-MNIST, no {absent[0]} or {absent[0]}.gz")
    target = cache_folder(cache) / "fashion-mnist"
    remotes = [file.remote for file in files.values()]
    remedy = f"get the four files from {URL} and give their folder as data_dir"
    fetch_missing("fashion-mnist", folders[::3], remotes, target, allowed=allowed, remedy=remedy)
    return target
