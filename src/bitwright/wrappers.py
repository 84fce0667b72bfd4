"""The user's module inside other people's wrappers."""

import functools
import logging

from torch import nn
from torch.optim.swa_utils import AveragedModel

logger = logging.getLogger("bitwright")

HOLDERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s, DistributedDataParallel's, DataParallel's and AveragedModel's wrappers."""
    while True:
        if isinstance(model, HOLDERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            if "_original_forward" in vars(model):
                say_autocast()
            return model


@functools.cache
def say_autocast() -> None:
    """A line in the log: accelerate replaces `forward` by one under autocast, whose numbers are no file's."""
    logger.warning(
        "bitwright: accelerate runs this model under autocast, and files compute in float32; before snap_biases, "
        "export and verify call accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
    )
