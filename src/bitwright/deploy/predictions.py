"""What a network predicts, in three forms: whether its outputs name the same classes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.batches import class_axis
from bitwright.deploy.comparison import FLIP_RATE, VerifyReport

# Shares of the largest output below which classes tie: in exact arithmetic, and in the maps of float32 sums.
TIE, DENSE_TIE = 1e-12, 1e-6


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Which images (axis 0) have an element that differs, (images,) bool."""
    return (a != b).reshape(a.shape[0], -1).any(1)


def beaten(outputs: Tensor, predicted: Tensor, axis: int, clean: Tensor) -> Tensor:
    """Which images have a prediction that is not among the largest outputs, (images,) bool.

    Sums of integers tie in earnest, and then rounding, here in float64, decides which of the classes comes first. A
    map has thousands of predictions an image: among them are ties by float32's rounding, and where codes differ, as
    some may, one pixel in a thousand may as well, or one.

    clean: images whose codes agree everywhere.
    """
    dense = predicted[0].numel() > 1 and (outputs.ndim >= 4 or axis < outputs.ndim - 1)
    found = outputs.gather(axis, predicted.unsqueeze(axis)).squeeze(axis)
    tie = (DENSE_TIE if dense else TIE) * outputs.abs().amax()
    wrong = (found < outputs.amax(axis) - tie).reshape(len(found), -1)
    allowed = torch.where(clean, 0.0, max(1.0, FLIP_RATE * wrong.shape[1])) if dense else torch.zeros(len(found))
    return wrong.sum(1) > allowed


def in_rows(output: Tensor, images: int) -> Tensor:
    """`output` as floats with a row per image; one that does not keep the images apart counts for all of them."""
    found = output if output.is_floating_point() else output.double()
    if found.ndim > 1 and found.shape[0] == images:
        return found
    return found.reshape(images, -1) if found.numel() % images == 0 else found.reshape(1, -1).expand(images, -1)


def along_classes(output: Tensor, asked: int | None) -> int:
    """The axis of `output`, (images, ...), along which classes lie, 1 or more; asked: `class_axis` of `verify`."""
    axis = class_axis(output) if asked is None else asked
    axis = axis + output.ndim if axis < 0 else axis
    return axis if 0 < axis < output.ndim else output.ndim - 1


def compare_outputs(
    report: VerifyReport,
    trained: Sequence[Tensor],
    frozen: Sequence[Tensor],
    file: Sequence[Tensor],
    clean: Tensor,
    exact: Callable[[Tensor], Sequence[Tensor] | None],
    class_axis: int | None = None,
) -> None:
    """Add one batch's outputs, each (images, ..., classes) or (images, classes, rows, columns), to the report.

    An image counts once, however many of its outputs differ.

    exact: the training form's outputs without rounding for the images of a mask. class_axis: as `verify` takes it.
    """
    images = len(clean)
    forms = [[in_rows(t, images) for t in outputs] for outputs in (trained, frozen, file)]
    axes = [along_classes(t, class_axis) for t in forms[0]]
    for row, axis in zip(report.outputs, axes, strict=True):
        row.class_axis = axis
    ours, integers, theirs = ([t.argmax(axis) for t, axis in zip(form, axes, strict=True)] for form in forms)
    undecided = anywhere(differing, ours, integers) | anywhere(differing, ours, theirs)
    if bool(undecided.any()):
        count = int(undecided.sum())
        found = exact(undecided)
        outputs = [t[undecided] for t in forms[0]] if found is None else [in_rows(t, count) for t in found]
        again = [t.argmax(axis) for t, axis in zip(outputs, axes, strict=True)]
        ours, integers, theirs = ([t[undecided] for t in form] for form in (ours, integers, theirs))
        report.float32_differs += int(anywhere(differing, again, ours).sum())
        agree = [clean[undecided]] * len(outputs)
        report.different_frozen += int(anywhere(beaten, outputs, integers, axes, agree).sum())
        report.different_file += int(anywhere(beaten, outputs, theirs, axes, agree).sum())
    report.images += images
    report.clean_images += int(clean.sum())
    for row, ours_k, theirs_k in zip(report.outputs, forms[0], forms[2], strict=True):
        row.add(ours_k, theirs_k, clean)


def anywhere(different: Callable[..., Tensor], *forms: Sequence[Any]) -> Tensor:
    """Which images differ in any output, (images,) bool."""
    return torch.stack([different(*each) for each in zip(*forms, strict=True)]).any(0)
