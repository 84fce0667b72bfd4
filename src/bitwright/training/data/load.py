"""`load_data`: a data set from its name."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError
from bitwright.training.data.cifar import CIFAR10, CIFAR100, cifar
from bitwright.training.data.dataset import Dataset
from bitwright.training.data.digits import digits
from bitwright.training.data.fashion_mnist import FILES, fashion_mnist
from bitwright.training.data.folder import imagefolder
from bitwright.training.data.own import own_data
from bitwright.training.lookup import check_options, close_matches

DATA: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fashion-mnist": functools.partial(fashion_mnist, FILES),
    "cifar10": functools.partial(cifar, CIFAR10),
    "cifar100": functools.partial(cifar, CIFAR100),
    "imagefolder": functools.partial(imagefolder, "imagefolder"),
    "imagenet": functools.partial(imagefolder, "imagenet"),
}


def load_data(
    name: str, *, data_dir: str | Path | None = None, cache: str | Path | None = None, **options: Any
) -> Dataset:
    """The data set called `name`, a key of `DATA`, or `FILE.py:NAME` for one of the user's own (`own.own_data`).

    data_dir: the first place to look in. cache: the folder for downloads, by default `bitwright` in the user's cache
    folder; looked in too. options: `subset` (n training images, every class in proportion, always the same ones),
    `augment`, `mean` and `std` (a number a channel, for pixels in [0, 1]); `download=False` for sets that are
    otherwise fetched; `image_size` for CIFAR and for pictures in folders; `resize` and `workers` for the latter.

    Raises: BitwrightError for an unknown name (with close matches) or option, and for data that is missing, damaged
    or cannot be fetched.
    """
    if ":" in name:
        return own_data(name, data_dir=data_dir, **options)
    if name not in DATA:
        raise BitwrightError(f"unknown data {name!r}; {close_matches(name, [*DATA, 'FILE.py:NAME'])}")
    loader = DATA[name]
    check_options(loader, options, f"data {name!r}")
    if loader is not digits:
        options = {"data_dir": data_dir, "cache": cache} | options
    return loader(**options)
