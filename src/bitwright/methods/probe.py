"""Looking without touching: forward passes that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitwright.batches import Inputs
from bitwright.prepare import quantizers
from bitwright.wrappers import unwrap


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the model is what it was, to the last bit, whatever forward passes or `set_bits` did meanwhile.

    Put back: every buffer (norm statistics, min-max ranges, bit-widths), the quantizers' parameters (scales follow
    `set_bits`), and torch's random state on the CPU and on the model's GPU. Modes are left alone: in training mode
    norms use the batch's own statistics, as the training loss does. Must not enclose part of a step whose backward
    pass is still to come, because restoring writes in place.
    """
    found = list(quantizers(model).values())
    kept = [*model.buffers(), *(p for q in found for p in q.parameters())]
    copies = [t.detach().clone() for t in kept]
    derived = [q.derived for q in found]
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            # One launch per type on a GPU, where there are hundreds of tensors.
            torch._foreach_copy_(kept, copies)  # pyright: ignore[reportPrivateImportUsage]
        for quantizer, before in zip(found, derived, strict=True):
            if quantizer.derived != before:  # what depends on the bits and is no buffer
                quantizer.refresh()


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """`model.train()` for a while, if it is in evaluation mode, as a validation may leave it; parts of a model that
    trains stay in the mode that they have. Every module's own mode afterwards.
    """
    modes = [(m, m.training) for m in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def forward_fast(model: nn.Module, inputs: Inputs) -> Any:
    """What `model` puts out, up to rounding, channels last where the CPU's convolutions gain by it (a third of
    ResNet-20's time).

    For passes without gradient. Networks that insist on their layout (`Tensor.view` on a feature map) and compiled
    ones, which would be compiled anew, get their inputs as they are.
    """
    x = inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else None
    if x is not None and x.ndim == 4 and x.device.type == "cpu" and unwrap(model) is model:
        try:
            return model(x.contiguous(memory_format=torch.channels_last))
        except RuntimeError as error:
            if "view" not in str(error):
                raise
    return inputs.call(model)
