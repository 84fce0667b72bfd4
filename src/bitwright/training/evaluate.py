"""Accuracy on a test split."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.calibrate import evaluating
from bitwright.coverage import Coverage, coverage
from bitwright.errors import BitwrightError
from bitwright.prepare import quantizers
from bitwright.training.data import Dataset

COVERAGE_IMAGES = 8


@dataclass(frozen=True)
class Evaluation:
    """accuracy in [0, 1] and mean cross-entropy over `images`; coverage of the quantizers, None in float networks."""

    accuracy: float
    loss: float
    images: int
    coverage: Coverage | None


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, check: Callable[[], None] | None = None
) -> Evaluation:
    """Run `model` (float32, evaluation mode) over batches of images and labels on its device.

    check: called between batches; may raise to stop.

    Raises: BitwrightError where there is no batch, or labels exceed the model's classes.
    """
    covered, correct, loss, images = None, 0, 0.0, 0
    with evaluating(model):
        for x, y in batches:
            if covered is None and quantizers(model):
                covered = coverage(model, x[:COVERAGE_IMAGES])
            outputs = model(x)
            if images == 0:
                check_labels(outputs, y)
            correct += int((outputs.argmax(1) == y).sum())
            loss += float(F.cross_entropy(outputs.float(), y, reduction="sum"))
            images += len(y)
            if check is not None:
                check()
    if images == 0:
        raise BitwrightError("evaluate: the test split is empty")
    return Evaluation(correct / images, loss / images, images, covered)


def check_labels(outputs: Tensor, y: Tensor) -> None:
    """Raise BitwrightError where a label has no output."""
    if outputs.ndim != 2 or int(y.max()) >= outputs.shape[1]:
        raise BitwrightError(
            f"labels go up to {int(y.max())}, the model's output has shape {tuple(outputs.shape)}; "
            f"use a model with at least {int(y.max()) + 1} classes"
        )


def some_images(dataset: Dataset, count: int, *, device: torch.device | str, batch_size: int = 256) -> Iterator[Tensor]:
    """Batches of `count` distinct images (fewer where there are not so many): test images, then training images.

    None is augmented.
    """
    left = count
    rest = max(0, count - dataset.test_size)
    more = dataset.calibration_batches(seed=0, batch_size=batch_size, count=math.ceil(rest / batch_size), device=device)
    for x, _ in itertools.chain(dataset.test_batches(batch_size=batch_size, device=device), more):
        if left <= 0:
            return
        yield x[:left]
        left -= len(x)
