"""Blocks of a network by name: finding them, recording and replacing what they put out."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.methods.lean import channels_last, is_channels_last

GRANULARITIES = ("stage", "block")
STAGES = 4  # into which a plain row of transformer blocks is cut


def find_blocks(model: nn.Module, granularity: str = "stage") -> list[str]:
    """Names of the modules whose outputs end the blocks of `model`, in the order of the forward pass.

    Known by their structure: ResNets (`layer1`, `layer2` ...; CIFAR, torchvision, timm), a row of stages (`stages`,
    or `blocks` of sequences: timm), a row of transformer blocks (`blocks` of timm, `encoder.layers` of
    torchvision; "stage" cuts the row into 4), VGG (`features` with max poolings) and torchvision's ConvNeXt.

    Args:
        model: float or prepared. granularity: "stage", or "block" (residual blocks, transformer blocks, or
            convolution units of a VGG).

    Raises:
        BitwrightError: the structure is none of these.
    """
    children = dict(model.named_children())
    stages = sorted((n for n in children if re.fullmatch(r"layer\d+", n)), key=lambda n: int(n[5:]))
    if len(stages) > 1:
        return stages if granularity == "stage" else inner(model, stages)
    for name in ("stages", "blocks", "encoder.layers"):
        row = find(model, name)
        if isinstance(row, nn.Sequential | nn.ModuleList) and len(row) > 1:
            names = [f"{name}.{n}" for n, _ in row.named_children()]
            if name == "stages" or isinstance(next(row.children()), nn.Sequential):
                return names if granularity == "stage" else inner(model, names)
            if granularity == "block" or len(names) <= STAGES:
                return names
            return [names[(i + 1) * len(names) // STAGES - 1] for i in range(STAGES)]
    features = children.get("features")
    if isinstance(features, nn.Sequential):
        row = list(features.named_children())
        if any(isinstance(m, nn.MaxPool2d) for _, m in row):
            return vgg_units(row, granularity)
        stages = [f"features.{n}" for n, m in row if is_stage(m)]
        if len(stages) > 1:
            return stages if granularity == "stage" else inner(model, stages)
    raise BitwrightError(
        f"bwrf: the blocks of this {type(model).__name__} are not known; give them as blocks: [name, ...] "
        f"(its modules: {', '.join(list(children)[:6])} ...)"
    )


def find(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule called `name`, or None."""
    return dict(model.named_modules()).get(name)


def inner(model: nn.Module, stages: list[str]) -> list[str]:
    """The blocks inside each stage (in a child called `blocks`, or its children)."""
    names = []
    for stage in stages:
        row = find(model, f"{stage}.blocks")
        prefix = stage if row is None else f"{stage}.blocks"
        names += [f"{prefix}.{n}" for n, _ in model.get_submodule(prefix).named_children()]
    return names


def is_stage(module: nn.Module) -> bool:
    """Whether a child of torchvision's ConvNeXt is a row of residual blocks (and not a stem or downsampling)."""
    kinds = {type(m) for m in module.children()}
    return type(module) is nn.Sequential and len(kinds) == 1 and any(True for _ in next(module.children()).children())


def vgg_units(row: list[tuple[str, nn.Module]], granularity: str) -> list[str]:
    """Ends of blocks in a plain row of layers: its poolings; or every last layer before the next convolution."""
    if granularity == "stage":
        return [f"features.{n}" for n, m in row if isinstance(m, nn.MaxPool2d)]
    following = [m for _, m in row[1:]] + [None]
    return [f"features.{n}" for (n, _), after in zip(row, following, strict=True) if ends_unit(after)]


def ends_unit(after: nn.Module | None) -> bool:
    """Whether a unit ends before `after`."""
    return after is None or isinstance(after, nn.Conv2d)


class Tap:
    """A forward hook that records a block's output, or puts something in its place.

    A model that carries taps can be copied, pickled and exported: a copy's taps are inert, and in evaluation mode
    or without gradient they do nothing unless `always` is set.

    Attributes:
        output: the latest output that was recorded, or None.
        append: rows (batch axis 0) to add below the output. replace: a tensor to put in its place.
    """

    def __init__(self, always: bool = False):
        self.always, self.alive = always, False
        self.output: Any = None
        self.append: Tensor | None = None
        self.replace: Tensor | None = None

    def __reduce__(self) -> tuple[type["Tap"], tuple[()]]:
        return Tap, ()

    def attach(self, module: nn.Module) -> Any:
        """Register on `module`; the handle removes it."""
        self.alive = True
        return module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.alive or not (self.always or (module.training and torch.is_grad_enabled())):
            return None
        self.output = output
        if self.replace is not None:
            return self.replace.to(output.dtype)
        if self.append is None:
            return None
        # Of one type and layout: all that follows takes its time from these.
        rows = self.append.to(output.dtype)
        rows = channels_last(rows) if is_channels_last(output) else rows
        return torch.cat([output, rows])
