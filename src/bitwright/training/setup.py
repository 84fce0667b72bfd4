"""From a recipe to the things that it names: device, data, networks."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers import let_wait
from bitwright.layers.reproducible import make_reproducible
from bitwright.prepare import prepare
from bitwright.rules import resolve
from bitwright.topology import topology
from bitwright.training.data import Dataset, load_data
from bitwright.training.machine import cores
from bitwright.training.models import build_model
from bitwright.training.recipe import Recipe


@contextmanager
def blame(source: str) -> Iterator[None]:
    """Put the recipe's name before what a part of it was refused for."""
    try:
        yield
    except BitwrightError as error:
        raise BitwrightError(f"{source}: {error}") from error.__cause__


def choose_device(recipe: Recipe) -> torch.device:
    """The recipe's device; `auto` is CUDA where there is one. Raises: BitwrightError for CUDA that is not there."""
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BitwrightError(f"{recipe.source}: device: {name!r} is not on this machine; use auto or cpu")
    return device


def set_threads(recipe: Recipe) -> int:
    """Set torch's CPU threads as the recipe says, else OMP_NUM_THREADS, else all cores; returns the number."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return torch.get_num_threads()


def recipe_data(recipe: Recipe, cache: Path | None = None) -> Dataset:
    """The recipe's data set."""
    with blame(recipe.source):
        return load_data(recipe.data.name, data_dir=recipe.data.dir, cache=cache, **recipe.data.options)


def float_model(
    recipe: Recipe, dataset: Dataset, *, fresh: bool = False, extra: Mapping[str, Any] | None = None
) -> nn.Module:
    """The recipe's network without quantizers, on the CPU; weights from torch's global random state.

    extra: further options for `build_model` (`checkpoint`, `pretrained`). fresh: leave those of the recipe out, for a
    network whose weights are loaded afterwards.
    """
    given = dict(recipe.model.options)
    if fresh:
        given = {k: v for k, v in given.items() if k not in ("checkpoint", "pretrained")}
    with blame(recipe.source):
        return build_model(
            recipe.model.name,
            num_classes=dataset.num_classes,
            in_channels=dataset.in_channels,
            image_size=dataset.image_size,
            example=dataset.blank,
            **{**given, **(extra or {})},
        )


def quantize(recipe: Recipe, model: nn.Module, dataset: Dataset) -> nn.Module:
    """Swap in the recipe's quantizers (`bits: float`: none, only norms that wait); returns the same model."""
    if not recipe.quantized:
        let_wait(model)
        return model
    with blame(recipe.source):
        resolve(model, recipe.rules)  # alone first, so that a message numbers them as the recipe does
        rules = recipe.all_rules()
        prepare(model, recipe.all_rules(topology(model, dataset.blank, recipe.topology, rules=rules)))
        return make_reproducible(model) if recipe.reproducible else model


def place(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Move to the device, in the recipe's memory format; returns the same model."""
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model
