"""A network from the user's own Python: `FILE.py:NAME` or `MODULE:NAME`."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.training.own_code import Own, find_own, import_own

RETURNS = "a class or function that returns a torch.nn.Module"


def own_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int | None,
    example: Tensor | None,
    options: dict[str, Any],
) -> nn.Module:
    """The network that a class or function of the user's (`own_code.find_own`) makes, in training mode.

    It is called with `options` and with those of num_classes, in_channels and image_size that it has parameters for.

    The network is tried on `example`, one sample, in evaluation mode and without moving random states: one that does
    not fit the data is refused before anything is trained. None: a black image of `image_size`, where that is given.

    Raises: BitwrightError for a file or name that is not there, for code that raises, and for a network whose output
        is not one number a class.
    """
    own = find_own("model", name, RETURNS)
    model = own.made({"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}, options)
    if not isinstance(model, nn.Module):
        raise own.error(f"returned a {type(model).__name__}; use {RETURNS}")
    if example is None and image_size is not None:
        example = torch.zeros(1, in_channels, image_size, image_size)
    if example is not None:
        _try(model, example, num_classes, own)
    return model.train()


def fingerprint(name: str, model: nn.Module) -> str | None:
    """Names what a network of `own_model` computes: a hash of its file and of its modules; None for other names."""
    if ":" not in name:
        return None
    source = import_own("model", name).__file__
    code = Path(source).read_bytes() if source else b""
    return hashlib.sha256(code + repr(model).encode()).hexdigest()


def _try(model: nn.Module, example: Tensor, num_classes: int, own: Own) -> None:
    """One forward pass, whose output must be one row of at least `num_classes` numbers."""
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = model(example)
    except Exception as error:
        raise own.error(f"fails on samples of shape {tuple(example.shape)} ({own.said(error)})") from error
    if not isinstance(output, Tensor):
        raise own.error(f"its output is a {type(output).__name__}; one tensor (samples, classes) is accepted")
    if output.ndim != 2 or len(output) != 1 or output.shape[1] < num_classes:
        raise own.error(
            f"its output has shape {tuple(output.shape)}; the data has {num_classes} classes, (1, {num_classes}) is "
            "accepted"
        )
